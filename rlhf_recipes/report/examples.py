"""Sample completions of the policies, side by side on the same prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rlhf_recipes.figures import number
from rlhf_recipes.report.content import Answer, Block, Comparison, Samples, Text
from rlhf_recipes.report.palette import hue
from rlhf_recipes.report.reading import Run, finite

ORDER = ("other", "base", "rm", "sft", "dpo", "ppo")
BEST, WORST, RANDOM = 2, 2, 6
LONGEST = 2000
"""Characters of a text that are shown."""


def samples(run: Run) -> list[Block]:
    """The best, the worst and some other answers of the evaluation; without one, some of the stages' own samples."""
    rows = _evaluated(run.samples) if run.samples else _of_stages(run)
    if not rows:
        return []
    policies = dict.fromkeys(policy for row in rows for policy in row["completions"])
    last = max(policies, key=lambda policy: ORDER.index(hue(policy)))
    chosen = _chosen(rows, last)
    which = "drawn at random"
    if len({label for _, label in chosen}) > 1:
        which = f"those where the reward of {last} is highest and lowest, and some drawn at random"
    text = f"{len(chosen)} of {len(rows):,} prompts: {which}."
    return [Text(text), Samples([_comparison(row, label) for row, label in chosen])]


def _evaluated(found: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completions": dict(row.get("completions") or {})} for row in found]


def _of_stages(run: Run) -> list[dict[str, Any]]:
    """The samples of all stages by prompt, with their scores."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in run.finished:
        for sample in stage.samples:
            scores = sample.get("scores") or {}
            row = rows.setdefault(sample["prompt"], {})
            for policy, text in sample.items():
                if policy not in ("prompt", "scores"):
                    name = stage.name if policy == stage.stage else policy
                    known = row.setdefault(name, {"text": text})
                    if known["text"] == text:  # of a stage made again since, the others know the policy before
                        known |= scores.get(policy) or {}
    return [{"prompt": prompt, "completions": completions} for prompt, completions in rows.items()]


def _chosen(rows: list[dict[str, Any]], last: str) -> list[tuple[dict[str, Any], str]]:
    """Rows with the reason for showing each; drawn with a fixed seed, so that a report made again shows the same."""
    scored = [(reward, i) for i, row in enumerate(rows) if (reward := _reward(row, last)) is not None]
    ranked = [i for _, i in sorted(scored, reverse=True)]
    best = ranked[:BEST]
    worst = [i for i in ranked[::-1][:WORST] if i not in best]
    rest = [i for i in range(len(rows)) if i not in (*best, *worst)]
    drawn = sorted(random.Random(0).sample(rest, min(RANDOM, len(rest))))
    labels = {f"highest reward of {last}": best, f"lowest reward of {last}": worst, "random": drawn}
    return [(rows[i], label) for label, chosen in labels.items() for i in chosen]


def _reward(row: Mapping[str, Any], policy: str) -> float | None:
    return finite((row["completions"].get(policy) or {}).get("reward"))


def _comparison(row: Mapping[str, Any], label: str) -> Comparison:
    answers = []
    for policy, said in row["completions"].items():
        scores = {name: finite(said.get(name)) for name in ("reward", "gold")}
        shown = ", ".join(f"{name} {number(value)}" for name, value in scores.items() if value is not None)
        answers.append(Answer(policy, hue(policy), _cut(str(said["text"])), shown))
    return Comparison(_cut(str(row["prompt"])), answers, label)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"
