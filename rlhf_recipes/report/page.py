"""A report set as one HTML file, and as Markdown without its plots."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rlhf_recipes.report.content import (
    Block,
    Commands,
    Key,
    Lineage,
    Node,
    Plots,
    Samples,
    Table,
    Text,
    Tiles,
)
from rlhf_recipes.report.palette import COLOURS
from rlhf_recipes.report.sections import Report

TEMPLATE = Path(__file__).parent / "page.html.jinja"


def html(report: Report) -> str:
    """One file that needs no other and asks for none: plots, style and all; no script. All text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["anchor"] = lambda title: re.sub(r"\W+", "-", title.lower())
    environment.tests["block"] = lambda block, kind: type(block).__name__ == kind
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, colours=COLOURS, made=_today())


def markdown(report: Report) -> str:
    """The same tables, answers and commands for a README, an issue or a terminal."""
    parts = [f"# {_escaped(report.run)}", "\n".join(f"- {key}: {_escaped(value)}" for key, value in report.facts)]
    if report.faults:
        parts += ["**To know:**", "\n".join(f"- {_escaped(fault)}" for fault in report.faults)]
    for section in report.sections:
        if all(isinstance(block, Text | Plots | Key) for block in section.blocks):
            continue  # words about plots
        parts += [f"## {section.title}", *(text for block in section.blocks if (text := _said(block)))]
    return "\n\n".join([*parts, f"Made on {_today()} by RLHF Recipes."]) + "\n"


@functools.singledispatch
def _said(block: Block) -> str:
    """A block as Markdown; plots and their keys have none."""
    return ""


@_said.register
def _(block: Text) -> str:
    heading = f"### {_escaped(block.heading)}" if block.heading else ""
    return "\n\n".join(part for part in (heading, _escaped(block.text)) if part)


@_said.register
def _(block: Table) -> str:
    rows = [[_escaped(cell) for cell in row.cells] for row in block.rows]
    rule = ["---"] * block.left + ["---:"] * (len(block.columns) - block.left)
    lines = [_line(block.columns), _line(rule), *map(_line, rows)]
    return "\n".join(lines) + (f"\n\n{_escaped(block.note)}" if block.note else "")


@_said.register
def _(block: Tiles) -> str:
    return "\n".join(f"- {_escaped(tile.label)} **{tile.value}** ({_escaped(tile.note)})" for tile in block.tiles)


@_said.register
def _(block: Lineage) -> str:
    def listed(node: Node, depth: int) -> list[str]:
        facts = "; ".join(f"{key} {_escaped(value)}" for key, value in node.facts)
        warned = "".join(f"; **{_escaped(warning)}**" for warning in node.warnings)
        state = f" ({node.state})" if node.state != "base" else ""
        line = f"{'  ' * depth}- **{_escaped(node.name)}**{state}: {facts}{warned}"
        return [line, *(below for child in node.children for below in listed(child, depth + 1))]

    return "\n".join(listed(block.root, 0))


@_said.register
def _(block: Commands) -> str:
    return _fenced("\n".join(block.lines), "sh")


@_said.register
def _(block: Samples) -> str:
    parts = []
    for one in block.comparisons:
        parts.append(f"### Prompt ({_escaped(one.label)})\n\n{_fenced(one.prompt)}")
        for answer in one.answers:
            scores = f" ({answer.scores})" if answer.scores else ""
            parts.append(f"{_escaped(answer.policy)}{scores}:\n\n{_fenced(answer.text)}")
    return "\n\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, also in the cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str = "text") -> str:
    """A block of text behind a fence that the text itself does not hold."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
