"""What our recipes cost beside a bare TRL script: writes benchmarks/results/overhead.md.

    python -m benchmarks.overhead [--model <folder or hub id>] [--dtype float32]

SFT, RM and DPO on the rows and settings of `benchmarks.stages`; ours once with all layers trained, as the script does,
and once with the default trunk.
"""

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks import stages
from benchmarks.stages import Row
from benchmarks.turns import DTYPES, Contestant, base_in, header, options, probe, spread, write

STAGES = ("sft", "rm", "dpo")


def main() -> None:
    """Run both in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options("overhead", __doc__, task=False)
    chosen.model = base_in(chosen)
    data, runs = chosen.cache / "stages", chosen.cache / "runs" / "overhead" / chosen.dtype
    stages.write_rows(data, chosen.model)
    lines = [f"| stage | in {DTYPES[chosen.dtype]} | s / step | x TRL | peak anonymous, MB | x TRL |", "|---" * 6 + "|"]
    for stage in STAGES:
        rivals = {
            "bare TRL": bare(chosen, data, stage),
            "ours, trunk 0": ours(chosen, data, stage, "trunk=0"),
            "ours": ours(chosen, data, stage),
        }
        if stage == "sft":
            del rivals["ours, trunk 0"]  # SFT trains all layers anyway
        rows: dict[str, list[Row]] = {name: [] for name in rivals}
        for turn in range(chosen.turns):
            for name, rival in rivals.items():
                rows[name].append(Row(stage, name, probe(rival, runs / str(turn))))
        lines += table(stage, rows)
    head = header("Ours beside a bare TRL script", "overhead", chosen, rows["ours"][0].cost)
    write("overhead", [*head, *lines, "", *NOTES], chosen.dtype)


def ours(chosen: Namespace, data: Path, stage: str, *overrides: str) -> Contestant:
    """Our recipe."""
    return stages.contestant(chosen, data, stage, False, *overrides)


def bare(chosen: Namespace, data: Path, stage: str) -> Contestant:
    """The script with the same arguments."""

    def program(folder: Path, seed: int) -> Sequence[str]:
        training = stages.training(stage, False) | {"output_dir": str(folder / "out"), "seed": seed}
        rows = data / f"{'sft' if stage == 'sft' else 'preferences'}.jsonl"
        script = str(Path(__file__).parent / "bare_trl.py")
        return [script, stage, chosen.model, chosen.dtype, str(rows), json.dumps(training)]

    return Contestant(f"{stage}-bare", Path(sys.executable), stages.IMPORTS, program, rival=False)


def table(stage: str, rows: dict[str, list[Row]]) -> list[str]:
    """A line for each contestant of a stage."""
    first = rows["bare TRL"]
    lines = []
    for name, turns in rows.items():
        seconds, memory = [row.seconds for row in turns], [float(row.cost.anonymous) for row in turns]
        ratios = [
            f"{sum(own) / sum(theirs):.2f}"
            for own, theirs in (
                (seconds, [row.seconds for row in first]),
                (memory, [float(row.cost.anonymous) for row in first]),
            )
        ]
        lines.append(f"| {stage} | {name} | {spread(seconds, 3)} | {ratios[0]} | {spread(memory, 0)} | {ratios[1]} |")
    return lines


NOTES = [
    "- The rows, lengths and micro-batches of benchmarks/results/stages.md, without checkpointing; LoRA r=16.",
    "- Mean over the turns (lowest to highest). In RM and DPO the default trunk leaves the lower layers alone.",
    "- Ours also evaluates held-out rows and samples answers, which the script does not; the peak includes that.",
]


if __name__ == "__main__":
    main()
