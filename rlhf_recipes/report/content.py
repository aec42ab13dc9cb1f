"""What a report is made of, before it is set as HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph; `heading` stands above it where it begins something, `hue` names the colour of that."""

    text: str
    heading: str = ""
    hue: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table. `hue` names its colour on the page, and what is `muted` is greyed."""

    cells: Sequence[str]
    hue: str = ""
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under their columns; the first `left` columns are words, the others figures."""

    columns: Sequence[str]
    rows: Sequence[Row]
    left: int = 1
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture as SVG under its title, with a few words on it; many `small` ones go side by side."""

    svg: str
    title: str
    caption: str = ""
    small: bool = False


@dataclass(frozen=True)
class Plots:
    """Pictures side by side, as many as fit."""

    plots: Sequence[Plot]


@dataclass(frozen=True)
class Key:
    """Which colour is what in the plots below: names and their colours."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tile:
    """A figure to be seen first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """The figures to be seen first."""

    tiles: Sequence[Tile]
    hue: str = ""


@dataclass(frozen=True)
class Node:
    """Something of the lineage, and what was made from it."""

    name: str
    hue: str
    state: str
    facts: Sequence[tuple[str, str]]
    warnings: Sequence[str] = ()
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Lineage:
    """The stages as a tree."""

    root: Node


@dataclass(frozen=True)
class Commands:
    """Lines to be copied."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What a policy said to a prompt, and how that was scored."""

    policy: str
    hue: str
    text: str
    scores: str = ""


@dataclass(frozen=True)
class Comparison:
    """The answers of several policies to one prompt; `label` says why it was chosen."""

    prompt: str
    answers: Sequence[Answer]
    label: str = ""


@dataclass(frozen=True)
class Samples:
    """Answers side by side; the page folds away those beyond the first `open`."""

    comparisons: Sequence[Comparison]
    open: int = 6


Block = Text | Table | Plots | Key | Tiles | Lineage | Commands | Samples


@dataclass(frozen=True)
class Section:
    """A heading, and what stands below it."""

    title: str
    blocks: Sequence[Block]
