"""What it saves to mind the lengths of texts: writes benchmarks/results/padding.md.

    python -m benchmarks.padding [--model <folder or hub id>] [--dtype float32]

PPO on prompts whose lengths spread as those of real data do: with and without micro-batches of like length
(`ppo/rollout.py`), and with and without reading the prompts by chunks (`portions.py`); in turns, each in a process of
its own.
"""

import json
import logging
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

from benchmarks import stages
from benchmarks.ppo_task import write_lines
from benchmarks.stages import Row
from benchmarks.turns import DTYPES, Contestant, base_in, header, options, probe, spread, write

EPISODES, MICRO_BATCH, ITERATIONS, COMPLETION = 32, 2, 5, 32
MEDIAN, SIGMA, LONGEST = 60, 0.8, 300  # of the log-normal lengths of prompts, in tokens
PADDED, SORTED, CHUNKS = "padded", "by length", "by length, prompts by chunks"
NOTES = [
    f"- PPO, {EPISODES} episodes an iteration in micro-batches of {MICRO_BATCH}, two passes, default trunk, no",
    f"  checkpointing. Prompts are log-normal in length: median {MEDIAN} tokens, sigma {SIGMA}, at most {LONGEST};",
    f"  completions have up to {COMPLETION}.",
    "- *Padded* is what TRL does: every episode as wide as the longest prompt and completion of the batch.",
    "- *Chunks*: `generate` reads prompts of more than 1,024 tokens in all a part at a time, as ours does on a CPU;",
    "  in the other rows it reads them at once, with the activations of all their tokens.",
    "- Time of a whole iteration, generation included, which padding makes slower in both.",
]


def main() -> None:
    """Run both in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) > 1 and sys.argv[1] == "padded":
        padded(sys.argv[2:])
        return
    chosen = options("padding", __doc__, task=False)
    chosen.model = base_in(chosen)
    prompts, runs = chosen.cache / "padding.jsonl", chosen.cache / "runs" / "padding" / chosen.dtype
    write_prompts(prompts, chosen.model)
    rows: dict[str, list[Row]] = {PADDED: [], SORTED: [], CHUNKS: []}
    for turn in range(chosen.turns):
        for name, turns in rows.items():
            run = probe(contestant(name, chosen, prompts), runs / str(turn))
            turns.append(Row("ppo", name, run))
    head = header("Micro-batches of like length, prompts by chunks", "padding", chosen, rows[PADDED][0].cost)
    write("padding", [*head, *table(rows, chosen.dtype), "", *NOTES], chosen.dtype)


def contestant(name: str, chosen: Namespace, prompts: Path) -> Contestant:
    """PPO by its recipe, with or without the sorting and the chunks."""
    training = stages.training("ppo", checkpointing=False) | {
        "max_steps": 2 * ITERATIONS,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": EPISODES // MICRO_BATCH,
        "steps_per_generation": EPISODES // MICRO_BATCH,
        "max_completion_length": COMPLETION,
    }
    overrides = [
        *(f"model.name_or_path={chosen.model}", f"model.dtype={chosen.dtype}", "start=model", "data=files"),
        *(f"data.prompts.path={prompts}", "evaluation.prompts=0", "reward=function"),
        f"reward.functions=[{Path(__file__).parent / 'long_words.py'}:share]",
        *(f"training.{key}={json.dumps(value)}" for key, value in training.items()),
    ]

    if name != CHUNKS:
        overrides.append("training.generation_kwargs={prefill_chunk_size: null}")

    def program(folder: Path, seed: int) -> Sequence[str]:
        module = ["benchmarks.padding", "padded"] if name == PADDED else ["recipes.ppo"]
        return ["-m", *module, f"runs_dir={folder / 'runs'}", "run=padding", f"seed={seed}", *overrides]

    return Contestant(name, Path(sys.executable), stages.IMPORTS, program, rival=False, steps=2)


def padded(overrides: list[str]) -> None:
    """The recipe, but every micro-batch is as wide as the rollout batch."""
    import torch

    from recipes import ppo
    from rlhf_recipes.ppo.rollout import MicroBatch, Rollout

    def sort(self: Rollout, size: int, multiple: int | None = None) -> None:
        whole = slice(None)
        self.micro_batches = [MicroBatch(rows, whole, whole) for rows in torch.arange(len(self.mask)).split(size)]
        self.trunk = [None] * len(self.micro_batches)

    Rollout.sort = sort  # type: ignore[method-assign]
    sys.argv = [sys.argv[0], *overrides]
    ppo.main()


def write_prompts(file: Path, model: str) -> None:
    """Prompts whose lengths spread."""
    chance = random.Random(0)
    text = stages.writer(model, chance)
    lengths = [min(round(MEDIAN * chance.lognormvariate(0, SIGMA)), LONGEST) for _ in range(EPISODES * ITERATIONS * 2)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(file, [{"prompt": text(n)} for n in lengths])


def table(rows: dict[str, list[Row]], dtype: str) -> list[str]:
    """A line each, with the ratio to the padded one."""
    lines = [f"| micro-batches, {DTYPES[dtype]} | s / iteration | | peak anonymous, MB | |", "|---" * 5 + "|"]
    first = rows[PADDED]
    seconds, memory = fmean(r.seconds for r in first), median(r.cost.anonymous for r in first)
    for name, turns in rows.items():
        own, peak = [row.seconds for row in turns], [float(row.cost.anonymous) for row in turns]
        ratios = f"{fmean(own) / seconds:.2f}", f"{median(peak) / memory:.2f}"
        lines.append(f"| {name} | {spread(own, 1)} | {ratios[0]} | {spread(peak, 0)} | {ratios[1]} |")
    return lines


if __name__ == "__main__":
    main()
