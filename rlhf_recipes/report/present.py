"""What of an evaluation is of the policies that the run has now: of a stage made again since, it measured another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.comparison.policies import FROM_RUN
from rlhf_recipes.config.options import TRAINING

KL_TO_SFT = "KL to SFT"

Found = dict[str, Any]
"""An evaluation, as `eval/metrics.json` holds it."""


def present(evaluation: Found, samples: Sequence[Any], now: Mapping[str, str]) -> tuple[Found, list[Any], list[str]]:
    """The evaluation and its samples without what is of other policies, SFT or reward model than there are now.

    Args:
        evaluation: what `eval/metrics.json` holds; empty if there is none.
        samples: what `eval/samples.json` holds.
        now: fingerprints of the run's finished stages, by name.

    Returns:
        Both, and a line for each thing that is left out.
    """
    if not evaluation:
        return {}, [*samples], []
    made_from = evaluation.get("made_from")
    if not isinstance(made_from, Mapping):
        old = "eval/metrics.json does not say of which policies it is, and is left out. Measure again: make eval"
        return {}, [], [old]
    measured = made_from.get("policies") or {}
    ours = {name for name in measured if name.partition("/")[0] in TRAINING}
    other = {name for name in ours if now.get(name) != measured[name]}
    another_sft, another_model = (
        made_from.get(key) not in (None, now.get(stage)) for key, stage in (("sft", "sft"), ("reward_model", "rm"))
    )
    measures = {KL_TO_SFT} if another_sft else set()
    measures |= set(made_from.get("by_reward_model") or []) if another_model else set()
    gone = [f"{', '.join(sorted(other))} (figures, wins and samples)"] if other else []
    gone += ["sft (KL to SFT, best of n)"] * another_sft + ["rm (its figures and its scores)"] * another_model
    if another_sft or "reward" in measures:
        other |= {name for name in measured if name.startswith("best-of-")}
    if not gone:
        return evaluation, [*samples], []
    told = f"eval/metrics.json is of another {'; '.join(gone)} than there is now: left out. Measure again: make eval"
    found = dict(evaluation)
    for key in ("policies", "benchmarks"):
        found[key] = {name: of for name, of in (found.get(key) or {}).items() if name not in other}
    found["policies"] = {n: {k: v for k, v in of.items() if k not in measures} for n, of in found["policies"].items()}
    found["win_rates"] = [
        row
        for row in found.get("win_rates") or []
        if not other & {row.get("policy"), row.get("baseline", found.get("baseline"))}
        and not (another_model and row.get("judge") == FROM_RUN)
    ]
    if another_sft or "reward" in measures:
        found["best_of_n"] = []
    if another_model:
        found["reward_model"] = {}
    return found, [_without(row, other, measures) for row in samples], [told]


def _without(row: Mapping[str, Any], policies: set[str], measures: set[str]) -> dict[str, Any]:
    completions = row.get("completions") or {}
    kept = {
        policy: {key: value for key, value in said.items() if key not in measures}
        for policy, said in completions.items()
        if policy not in policies
    }
    return {**row, "completions": kept}
