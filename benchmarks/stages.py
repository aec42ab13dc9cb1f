"""What each stage costs at equal lengths: writes benchmarks/results/stages.md, with PPO's memory as a ratio to SFT's.

    python -m benchmarks.stages [--model <folder or hub id>] [--dtype float32]

Every stage gets rows of 64 + 64 tokens in micro-batches of 4 sequences (RM and DPO: 2 pairs), with and without
activation checkpointing, each in a process of its own.
"""

import json
import logging
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.ppo_task import write_lines
from benchmarks.turns import DTYPES, Contestant, Probed, base_in, header, options, probe, write

PROMPT, COMPLETION = 64, 64  # tokens
SEQUENCES = 16  # of an optimizer step; a pair is two
MICRO_BATCH = 4
STEPS = 8
STAGES = {"sft": (), "rm": (), "dpo": (), "ppo": (), "ppo, all layers": ("trunk=0",)}
"""The rows: a recipe each, with what it is told besides."""
IMPORTS = ("trl:SFTTrainer", "trl:RewardTrainer", "trl:DPOTrainer", "rlhf_recipes:PPOTrainer")
NOTES = [
    "- LoRA r=16. SFT trains it in all layers, the other stages in the upper half unless the row says so.",
    f"- {PROMPT} + {COMPLETION} tokens, {SEQUENCES} sequences an optimizer step, micro-batches of {MICRO_BATCH}.",
    "- Memory is the peak of the process less what it has after importing its libraries.",
    "- Tokens are those of the rows, each counted once. DPO scores them under the reference, too; PPO makes half of",
    "  them, scores all under its roles, and trains on them twice.",
    "- TRL's LM head, which SFT and DPO use, has no kernel on a CPU: a tile of logits in full precision, 32,768 tokens",
    "  of the vocabulary wide, is there several times at once. PPO's and the reward model's loss do without.",
    "- PPO's reward here is a function; a reward adapter is one more set of LoRA weights.",
]


@dataclass(frozen=True)
class Row:
    """One stage in one setting."""

    stage: str
    setting: str
    cost: Probed

    @property
    def seconds(self) -> float:
        """Of one optimizer step (in PPO, of one iteration with its two), the first two left out."""
        return median(after - before for before, after in pairwise(self.cost.seconds[1:]))


def main() -> None:
    """Run every stage and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options("stages", __doc__, task=False, turns=False)
    chosen.model = base_in(chosen)
    data, runs = chosen.cache / "stages", chosen.cache / "runs" / "stages" / chosen.dtype
    write_rows(data, chosen.model)
    rows = [
        Row(label, setting, probe(contestant(chosen, data, label.split(",")[0], checkpointing, *more), runs))
        for setting, checkpointing in (("no checkpointing", False), ("checkpointing", True))
        for label, more in STAGES.items()
    ]
    head = header("The stages side by side", "stages", chosen, rows[0].cost)
    write("stages", [*head, *table(rows, chosen.dtype), "", *NOTES], chosen.dtype)


def contestant(chosen: Namespace, data: Path, stage: str, checkpointing: bool, *more: str) -> Contestant:
    """A stage as its recipe runs it, at the common lengths."""
    part = {"sft": "sft", "ppo": "prompts"}.get(stage, "preferences")
    overrides = [
        *(f"model.name_or_path={chosen.model}", f"model.dtype={chosen.dtype}", "start=model", "data=files"),
        f"data.{part}.path={data / part}.jsonl",
        *(f"training.{key}={json.dumps(value)}" for key, value in training(stage, checkpointing).items()),
        *more,
    ]
    if stage == "ppo":
        reward = Path(__file__).parent / "long_words.py"
        overrides += ["reward=function", f"reward.functions=[{reward}:share]", "evaluation.prompts=0"]

    def program(folder: Path, seed: int) -> Sequence[str]:
        return ["-m", f"recipes.{stage}", f"runs_dir={folder / 'runs'}", "run=stages", f"seed={seed}", *overrides]

    label = " ".join([stage, "with checkpointing" if checkpointing else "without checkpointing", *more])
    return Contestant(label, Path(sys.executable), IMPORTS, program, rival=False, steps=2 if stage == "ppo" else 1)


def training(stage: str, checkpointing: bool) -> dict[str, Any]:
    """The arguments of a stage's trainer."""
    common = {
        "max_steps": STEPS * (2 if stage == "ppo" else 1),
        "per_device_train_batch_size": MICRO_BATCH if stage in ("sft", "ppo") else MICRO_BATCH // 2,
        "gradient_accumulation_steps": SEQUENCES // MICRO_BATCH,
        "gradient_checkpointing": checkpointing,
        "save_strategy": "no",
        "use_cpu": True,
    }
    if stage != "ppo":
        return common
    rollout = {"steps_per_generation": SEQUENCES // MICRO_BATCH, "max_completion_length": COMPLETION}
    no_stop = {"eval_strategy": "no", "load_best_model_at_end": False, "kl_budget": None}
    return common | rollout | no_stop | {"value_pretraining_passes": 0}


def write_rows(folder: Path, model: str) -> None:
    """Demonstrations, pairs and prompts, every row with the same number of tokens."""
    text = writer(model, random.Random(0))
    answers = ("completion", "chosen", "rejected")
    rows = [
        {"prompt": text(PROMPT)} | {answer: text(COMPLETION - 1) for answer in answers}  # and EOS
        for _ in range(2 * SEQUENCES * STEPS)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for part, columns in {"sft": ("completion",), "preferences": ("chosen", "rejected"), "prompts": ()}.items():
        write_lines(folder / f"{part}.jsonl", [{key: row[key] for key in ("prompt", *columns)} for row in rows])


def writer(model: str, chance: random.Random) -> Callable[[int], str]:
    """A function that writes a text of so many tokens: random words that are one token each."""
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(model).get_vocab()
    words = sorted(token for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha())
    return lambda tokens: "".join(chance.choices(words, k=tokens)).replace("Ġ", " ")


def table(rows: Sequence[Row], dtype: str) -> list[str]:
    """A line for each stage and setting; ratios are to SFT in the same setting."""
    columns = f"stage | in {DTYPES[dtype]} | peak anonymous, MB | x SFT | peak RSS, MB | x SFT | tokens/s"
    lines = [f"| {columns} |", "|---" * 7 + "|"]
    for row in rows:
        sft = next(other.cost for other in rows if (other.stage, other.setting) == ("sft", row.setting))
        anonymous = f"{row.cost.anonymous:,} | {row.cost.anonymous / sft.anonymous:.2f}"
        resident = f"{row.cost.rss:,} | {row.cost.rss / sft.rss:.2f}"
        speed = SEQUENCES * (PROMPT + COMPLETION) / row.seconds
        lines.append(f"| {row.stage} | {row.setting} | {anonymous} | {resident} | {speed:,.0f} |")
    return lines


if __name__ == "__main__":
    main()
