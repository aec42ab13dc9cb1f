"""How PPO's cost grows with the length of texts and the micro-batch: a table and a picture in benchmarks/results.

    python -m benchmarks.growth

On a small model with random weights and a vocabulary of 50,000, where logits over a whole text would be most of the
memory: the recipe with its default trunk, all texts of one length, the last quarter the answer. On the CPU; about five
minutes.
"""

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.plan import QWEN, SHAPES, Row, make_model, write_data
from benchmarks.turns import RESULTS, Contestant, Probed, base_in, header, named, options, probe, write

LENGTHS = (128, 256, 512, 1024, 2048)  # tokens of prompt and answer
LENGTH, ROWS = 256, (2, 4, 8)  # sequences of a micro-batch, more than one, at that length
STEPS = 4  # each an iteration: two micro-batches are sampled, scored, and trained on once
VOCABULARY = SHAPES[QWEN]["vocab_size"]
IMPORTS = ("trl:GRPOTrainer", "rlhf_recipes:PPOTrainer")
MB = 1 << 20


@dataclass(frozen=True)
class Cost:
    """One length and micro-batch."""

    rows: int
    length: int
    probed: Probed

    @property
    def milliseconds(self) -> float:
        """Of an iteration by its tokens; the first iteration is left out."""
        seconds = median(after - before for before, after in pairwise(self.probed.seconds))
        return 1000 * seconds / (2 * self.rows * self.length)

    @property
    def logits(self) -> int:
        """MB that the float32 logits of one micro-batch would take, over all of its tokens."""
        return self.rows * self.length * VOCABULARY * 4 // MB


def main() -> None:
    """Run every length and micro-batch, and write table and plot."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options("growth", __doc__, task=False, model=False, turns=False)
    folder = chosen.cache / "growth"
    make_model(folder, QWEN)
    chosen.model = str(folder / QWEN)
    chosen.model = base_in(chosen)
    for length in LENGTHS:
        write_data(folder, length, length // 4)
    runs = chosen.cache / "runs" / "growth" / chosen.dtype
    by_length = [cost(chosen, folder, runs, 1, length) for length in LENGTHS]
    by_rows = [by_length[LENGTHS.index(LENGTH)], *(cost(chosen, folder, runs, rows, LENGTH) for rows in ROWS)]
    head = header("How cost grows", "growth", chosen, by_length[0].probed)
    picture = f"{named('growth', chosen.dtype)}.svg"
    write("growth", [*head, *report(by_length, by_rows, picture)], chosen.dtype)
    draw(by_length, by_rows, RESULTS / picture)


def cost(chosen: Namespace, folder: Path, runs: Path, rows: int, length: int) -> Cost:
    """Run PPO at a length and micro-batch."""
    row = Row("ppo", chosen.model, rows, length, [f"model.dtype={chosen.dtype}", f"training.max_steps={STEPS}"])

    def program(run: Path, seed: int) -> Sequence[str]:
        return ["-m", "recipes.ppo", *row.arguments(folder, "growth"), f"runs_dir={run / 'runs'}"]

    contestant = Contestant(f"{rows} x {length}", Path(sys.executable), IMPORTS, program, rival=False)
    return Cost(rows, length, probe(contestant, runs))


def report(by_length: Sequence[Cost], by_rows: Sequence[Cost], picture: str) -> list[str]:
    """The table, and what it says."""
    lines = [
        "| micro-batch x tokens | peak anonymous, MB | more than above, MB | float32 logits of all tokens, MB | "
        "ms / token |",
        "|---" * 5 + "|",
    ]
    for group in (by_length, by_rows):
        for i, one in enumerate(group):
            more = f"{one.probed.anonymous - group[i - 1].probed.anonymous:,}" if i else ""
            cells = [f"{one.rows} x {one.length}", f"{one.probed.anonymous:,}", more, f"{one.logits:,}"]
            lines.append("| " + " | ".join([*cells, f"{one.milliseconds:.1f}"]) + " |")
    first, last = by_length[0], by_length[-1]
    slope = (last.probed.anonymous - first.probed.anonymous) / (last.length - first.length)
    return [
        *lines,
        "",
        f"![peak memory and time per token]({picture})",
        "",
        f"- From {first.length} to {last.length} tokens the peak grows by {slope:.2f} MB a token. The logits of one "
        f"token in float32 take {VOCABULARY * 4 / MB:.2f} MB; loss and scores need several such tensors at once where "
        "they are made for a whole text.",
        f"- Model: {SHAPES[QWEN]['num_hidden_layers']} layers of {SHAPES[QWEN]['hidden_size']}, random weights; LoRA "
        "r=16 on all linear layers, default trunk, no checkpointing; the last quarter of a text is the answer.",
        "- Memory is the peak of the process less what it has after importing its libraries, the base's weights not "
        "counted where their file is mapped. Time is that of a whole iteration by its tokens: sampling, scoring by all "
        "roles, one training pass.",
    ]


def draw(by_length: Sequence[Cost], by_rows: Sequence[Cost], file: Path) -> None:
    """Peak memory and time per token against the length, and against the micro-batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, group, label in zip(figure.subplots(1, 2), (by_length, by_rows), ("tokens", "sequences"), strict=True):
        xs = [one.length if label == "tokens" else one.rows for one in group]
        axes.plot(xs, [one.probed.anonymous for one in group], marker="o", label="peak anonymous memory, MB")
        axes.plot(xs, [one.logits for one in group], linestyle="--", label="float32 logits of all tokens, MB")
        axes.set(xlabel=f"{label} of a micro-batch", ylabel="MB", ylim=(0, None))
        beside = axes.twinx()
        beside.plot(xs, [one.milliseconds for one in group], color="grey", marker=".", label="ms / token")
        beside.set(ylabel="ms / token", ylim=(0, None))
        axes.legend(loc="upper left")
        beside.legend(loc="lower right")
    figure.savefig(file)


if __name__ == "__main__":
    main()
