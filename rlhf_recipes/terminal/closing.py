"""The end of a stage: what was made, where, how good, how long, how much memory, and what comes next."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.figures import duration, few, number, table
from rlhf_recipes.runs import Stage, make_command
from rlhf_recipes.terminal.lines import say

if TYPE_CHECKING:
    from rlhf_recipes.evaluation import Changes

EXAMPLES = 4  # prompts shown with their answers
NEXT = {"sft": ("rm", "ppo"), "rm": ("ppo",), "dpo": ("eval", "report"), "ppo": ("eval", "report")}


def summary(
    stage: Stage,
    made: str,
    figures: Mapping[str, object],
    changes: Changes | None = None,
) -> None:
    """Tell at the end of a stage what was made, where, how good, how long, how much memory, and what comes next.

    Args:
        stage: the stage, finished.
        made: what it made, in a few words.
        figures: how good it is, by name: numbers, or (mean, half of the 95% interval).
        changes: the policies before and after, compared: a table, and a few prompts that they answer differently.
    """
    manifest = stage.manifest
    if "files" not in manifest:
        return  # of several processes, one finishes the stage, and tells
    size = sum(file["bytes"] for file in manifest["files"].values())
    shown = {name: value for name, value in figures.items() if not isinstance(value, Mapping | list | None)}
    memory = {"rss": "resident", "anonymous": "anonymous", "gpu": "on the GPU", "reserved": "reserved there"}
    following = NEXT.get(stage.name, ())
    rows = {
        "made": f"{made}, {size / 1e6:.1f} MB",
        "where": f"{stage.path}{os.sep}",
        "how good": ", ".join(f"{name} {number(value)}" for name, value in shown.items()),
        "how long": duration(manifest["seconds"]),
        "memory": ", ".join(f"{mb:,} MB {memory[kind]}" for kind, mb in manifest["peak_memory"].items())
        + " at the peak",
        "next": make_command(following, manifest["overrides"]) if following else "",
    }
    say(f"\n{manifest['run']}/{stage.name} is finished\n" + "\n".join(f"  {k:<9} {v}" for k, v in rows.items() if v))
    if changes and changes.figures:
        say("\n" + table([{"held-out prompts": policy, **measured} for policy, measured in changes.figures.items()]))
        if mark := few(len(changes.samples)):
            say(f"Rough intervals{mark}")
        if "kept" in figures:
            say(f"{stage.name} is the {figures['kept']} at held-out data, which flatters its figures there a little")
        say("\n" + _answers(changes.samples))


def _answers(samples: Sequence[Mapping[str, Any]]) -> str:
    """A few prompts with what each policy says, those first where they differ."""
    samples = [{name: said for name, said in row.items() if isinstance(said, str)} for row in samples]  # no scores
    unlike = sorted(samples, key=lambda row: len(set(row.values()) - {row["prompt"]}) == 1)
    lines = []
    for row in unlike[:EXAMPLES]:
        width = max(map(len, row))
        lines += [
            f"  {name if name != 'prompt' else '?':<{width}} {textwrap.shorten(text, 160, placeholder=' ...')}"
            for name, text in row.items()
        ]
    return "\n".join(lines)
