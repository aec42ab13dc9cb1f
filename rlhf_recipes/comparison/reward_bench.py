"""The reward model on pairs of several categories, in the form of RewardBench (arXiv 2403.13787)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_recipes import terminal
from rlhf_recipes.data.formats import BadRow, chat, convert, example, render, shown
from rlhf_recipes.errors import UserError

if TYPE_CHECKING:
    from rlhf_recipes.comparison.answers import RunModels

CATEGORIES = ("subset", "category")
FORM = ("chosen", "rejected")


def pairs(cfg: DictConfig) -> list[dict[str, Any]]:
    """Pairs of `prompt`, `chosen`, `rejected` and `subset` (or `category`) of `eval.reward_bench`; none if it is null.

    Raises:
        UserError: there is no such file or dataset, or a row is no pair with a category; the first of them is named.
    """
    if (source := cfg.eval.reward_bench) is None:
        return []
    from datasets import load_dataset

    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(source).suffix)
    try:
        loaded = load_dataset(kind, data_files=source, split="train") if kind else load_dataset(source)
    except Exception as error:  # of many classes, from the file system to the hub
        raise UserError(f"eval.reward_bench={source} cannot be read: {' '.join(str(error).split())[:300]}") from error
    rows = loaded if kind else next((loaded[name] for name in ("filtered", "test", "train") if name in loaded), [])
    found = []
    for number, row in enumerate(rows, 1):
        category = next((row[key] for key in CATEGORIES if row.get(key)), None)
        try:
            if category is None:
                raise BadRow(f"`subset` is missing; keys: {', '.join(row)}")
            pair = {key: row[key] for key in ("prompt", *FORM) if row.get(key) is not None}
            found += [one | {"subset": str(category)} for one in convert(pair, FORM, "preferences")]
        except BadRow as fault:
            raise UserError(
                f"eval.reward_bench={source}, row {number}: {fault}\nA good row:\n  "
                f'{example(FORM)[:-1]}, "subset": "chat"}}'
            ) from fault
    if not found:
        raise UserError(f"eval.reward_bench={source} holds no pairs: {shown(list(rows)[:1])}")
    return found


def by_category(cfg: DictConfig, run: RunModels, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of the run's reward model with its interval, and the number of pairs, by category."""
    import torch

    from rlhf_recipes import evaluation
    from rlhf_recipes.data.formats import is_conversational
    from rlhf_recipes.reward_model import agreement

    terminal.say(f"the reward model on {len(rows):,} pairs of {cfg.eval.reward_bench} ...")
    if is_conversational(run.asked[0]["prompt"]) or run.tokenizer.chat_template is not None:
        rows = [chat(row) for row in rows]  # plain text reads like an answer to nobody, for a chat model
    made = {
        side: [evaluation.Sample(row["prompt"], "", *render(row, run.tokenizer, side)) for row in rows] for side in FORM
    }
    scores = {
        side: torch.tensor(evaluation.rewards(run.roles, run.tokenizer, samples, cfg.evaluation.batch_size))
        for side, samples in made.items()
    }
    members: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        members[row["subset"]].append(number)
    found = {}
    for category, numbers in members.items():
        figures = agreement(
            scores["chosen"][numbers], scores["rejected"][numbers], [str(rows[n]["prompt"]) for n in numbers]
        )
        found[category] = {"accuracy": figures["accuracy"], "pairs": len(numbers)}
    return found
