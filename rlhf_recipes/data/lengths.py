"""What does not fit: rows longer than `max_length`, and prompts that do not fill a rollout batch. Both are counted."""

from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.formats import Row, render_prompt
from rlhf_recipes.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def fit(
    parts: "dict[str, Dataset | None]",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    texts: bool = False,
) -> "tuple[list[Any], str]":
    """Leave out what is longer than `max_length`, so that it is neither trained on nor sampled, scored or shown.

    An answer cut short would teach not to end. A `text`, which has no answer, is left to the trainer to cut or pack.

    Args:
        parts: by what to call them: tokenized rows, or rows of prompts, which need room for an answer of one token.
            A None stays None.
        texts: the tokenized rows are those of `text`.

    Returns:
        The parts in their order, and what to say of them, in one line.

    Raises:
        UserError: nothing is left of a part.
    """
    lengths = {name: [_length(row, tokenizer) for row in part] for name, part in parts.items() if part is not None}
    longest, total = max(map(max, lengths.values())), sum(map(len, lengths.values()))
    if max_length is None or longest <= max_length:
        return list(parts.values()), f"all {total:,} rows fit max_length={max_length} (longest: {longest:,} tokens)"
    kept = {name: [i for i, n in enumerate(found) if n <= max_length] for name, found in lengths.items()}
    too_long = {name: len(lengths[name]) - len(rows) for name, rows in kept.items() if len(rows) < len(lengths[name])}
    said = (
        f"{sum(too_long.values()):,} of {total:,} rows are longer than max_length={max_length} and "
        f"{'cut there (or split, where they are packed)' if texts else 'left out everywhere'}: "
        f"{', '.join(f'{n:,} {name}' for name, n in too_long.items())} (longest: {longest:,} tokens)"
    )
    if texts:
        return list(parts.values()), said
    if empty := [name for name, rows in kept.items() if not rows]:
        raise UserError(f"{said}. There are no {' and no '.join(empty)} left: raise training.max_length")
    return [None if part is None else part.select(kept[name]) for name, part in parts.items()], said


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


def _length(row: Row, tokenizer: "PreTrainedTokenizerBase") -> int:
    if "input_ids" in row:
        return len(row["input_ids"])
    if "chosen_ids" in row:
        return len(row.get("prompt_ids", ())) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
    return len(render_prompt(row, tokenizer)) + 1
