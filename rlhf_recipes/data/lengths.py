"""How many rows TRL's trainers would cut or drop at `max_length` without a word, counted beforehand."""

import sys
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from rlhf_recipes.data.formats import Row, is_conversational, render_whole
from rlhf_recipes.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lengths:
    """How many rows a trainer cuts or drops at `max_length`, and the longest row in tokens."""

    rows: int
    longest: int
    max_length: int | None
    cut: int
    dropped: int

    def __str__(self) -> str:
        lost = [f"{n:,} would be {what}" for n, what in ((self.cut, "cut"), (self.dropped, "dropped")) if n]
        if not lost:
            return f"all {self.rows:,} rows fit max_length={self.max_length} (longest: {self.longest:,} tokens)"
        return (
            f"{self.cut + self.dropped:,} of {self.rows:,} rows are longer than max_length={self.max_length}: "
            f"{' and '.join(lost)} (longest: {self.longest:,} tokens)"
        )


def check_lengths(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", recipe: str, max_length: int | None
) -> Lengths:
    """Count the rows that TRL's trainer of a recipe cuts or drops without a word.

    SFT and DPO cut the end off, and drop a row whose prompt alone fills `max_length`; the reward trainer drops every
    pair with an answer too long.

    Args:
        dataset: as `load` gives it, or with `chosen_ids` and `rejected_ids` for the reward trainer.
        recipe: `sft`, `rm` or `dpo`.
        max_length: as in the trainer's config; None is no limit.
    """
    columns = dataset.column_names
    answers: list[str | None] = [key for key in ("completion", "chosen", "rejected") if key in columns]
    limit = max_length or sys.maxsize
    longest = cut = dropped = 0
    rows = iter(dataset)
    while chunk := list(islice(rows, 1000)):
        if "chosen_ids" in columns:
            lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in chunk]
        else:
            by_answer = [_token_counts(chunk, tokenizer, answer) for answer in answers or [None]]
            lengths = [max(row) for row in zip(*by_answer, strict=True)]
        longest = max(longest, *lengths)
        too_long = [row for row, length in zip(chunk, lengths, strict=True) if length > limit]
        if recipe == "rm":
            dropped += len(too_long)
            continue
        full = sum(n >= limit for n in _token_counts(too_long, tokenizer, None)) if "prompt" in columns else 0
        dropped += full
        cut += len(too_long) - full
    return Lengths(len(dataset), longest, max_length, cut, dropped)


def check_batch(rows: int, batch: int) -> str:
    """What PPO's rollout batches leave of an epoch: a line for the log, "" where nothing is left out.

    Raises:
        UserError: fewer training prompts than one rollout batch takes; with both numbers and what to set.
    """
    if rows < batch:
        raise UserError(
            f"{rows} training prompts (data.prompts, train_dataset) do not fill a rollout batch, which takes {batch}, "
            "and an incomplete one is left out: nothing would be trained on. Give more prompts, or set a smaller "
            f"generation_batch_size: {rows} or less, a multiple of per_device_train_batch_size"
        )
    left = rows % batch
    return f"{left} of {rows:,} prompts, drawn anew, are left out of each epoch: a rollout batch takes {batch}" * bool(
        left
    )


def _token_counts(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", answer: str | None) -> list[int]:
    if not rows:
        return []
    text = [render_whole(row, tokenizer, answer) for row in rows]
    conversational = any(is_conversational(rows[0].get(key)) for key in ("prompt", "messages"))
    return [len(ids) for ids in tokenizer(text, add_special_tokens=not conversational)["input_ids"]]
