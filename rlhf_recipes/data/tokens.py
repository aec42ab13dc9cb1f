"""Rows as the trainers take them: token ids, and which of them are learned."""

from typing import TYPE_CHECKING

from rlhf_recipes.data.formats import Row, render_demonstration, render_learned

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is not learned, as in all of transformers."""


def demonstrations(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", prompts_too: bool = False) -> "Dataset":
    """Rows of SFT as `input_ids` and `labels`: the assistant's tokens are learned, in every turn; of a `text` all.

    Args:
        prompts_too: learn prompts and the users' turns as well.
    """

    def tokenize(row: Row) -> dict[str, list[int]]:
        ids, learned = render_demonstration(row, tokenizer)
        labels = [token if own or prompts_too else IGNORED for token, own in zip(ids, learned, strict=True)]
        return {"input_ids": ids, "labels": labels}

    return rows.map(tokenize, remove_columns=rows.column_names, desc="Tokenizing")


def comparisons(rows: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Pairs for DPO: `prompt_ids`, `chosen_ids` and `rejected_ids`, each answer with the mask of its learned tokens.

    The masks, `chosen_mask` and `rejected_mask`, cover prompt and answer; a `weight` stays with its pair.
    """

    def tokenize(row: Row) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        for key in ("chosen", "rejected"):
            prompt_ids, ids, learned = render_learned(row, tokenizer, key)
            mask = [0] * len(prompt_ids) + [int(own) for own in learned]
            tokens |= {"prompt_ids": prompt_ids, f"{key}_ids": ids, f"{key}_mask": mask}
        return tokens

    unread = [column for column in rows.column_names if column != "weight"]
    return rows.map(tokenize, remove_columns=unread, desc="Tokenizing pairs")
