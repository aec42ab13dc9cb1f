"""What a comparison found, as `metrics.json` and `samples.json` hold it and as a person sees it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import pstdev
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes import evaluation, figures, world
from rlhf_recipes.comparison import harness, reward_bench, texts, wins
from rlhf_recipes.comparison.answers import KL_TO_SFT, Answers, RunModels
from rlhf_recipes.comparison.judges import Judge, truth_is_known
from rlhf_recipes.comparison.policies import CATEGORY, FROM_RUN, Compared, best_of_kl, best_of_name, text
from rlhf_recipes.evaluation import GOLD, Interval, Rate
from rlhf_recipes.runs import disk

SCHEMA = 1
FAILED = 0.1
"""Share of comparisons without a verdict above which a win rate is marked: those that failed may not be like the
rest."""
COLUMNS = ("gold", *GOLD, "reward", "reward spread", KL_TO_SFT, "length", "EOS", "distinct-2", "repetition", "refusals")


def gather(
    cfg: DictConfig,
    compared: Compared,
    asked: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Answers],
    judges: Sequence[Judge],
) -> dict[str, Any]:
    """The figures of `metrics.json`, but for the reward model's own and the benchmarks."""
    each, gold = cfg.evaluation.samples, truth_is_known(cfg)
    found = {name: measures(of, each, gold=gold) for name, of in answers.items()}
    return {
        "schema": SCHEMA,
        "baseline": compared.baseline,
        "prompts": {
            "source": cfg.eval.prompts or "data.prompts",
            "count": len(asked),
            "samples": each,
            "fingerprint": disk.hash_value([dict(row) for row in asked]),
            "seed": cfg.seed,
        },
        "made_from": made_from(compared, answers),
        "policies": found,
        "kept": {} if cfg.eval.prompts else _kept(compared),
        "win_rates": win_rates(
            answers, compared.baseline, judges, [row.get(CATEGORY) for row in asked], each, compared.optimized
        ),
        "best_of_n": best_of_n(found, compared.best_of),
    }


def made_from(compared: Compared, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Fingerprints of all that the figures hang on, so that a report can tell whether they are the present ones."""
    keys = {name: of.key for name, of in answers.items()}
    common = next(iter(keys.values()))
    judged = [reward for reward in compared.rewards if reward.name == FROM_RUN]
    return {
        "policies": {name: key["policy"] for name, key in keys.items()},
        "base": common["base"]["weights"],
        "sft": common.get("sft"),
        "reward_model": common.get("reward model"),
        "by_reward_model": [r.measure for r in judged] + ["reward", "reward spread"] * any(r.weight for r in judged),
    }


def _kept(compared: Compared) -> dict[str, str]:
    """Which policies are the best of how many looks at the held-out prompts, by name."""
    stages = {policy.name: policy.stage.path for policy in compared.policies if policy.stage is not None}
    found = {name: json.loads((path / "metrics.json").read_text()) for name, path in stages.items()}
    return {name: metrics["kept"] for name, metrics in found.items() if "kept" in metrics}


def measures(answers: Answers, samples: int, *, gold: bool) -> dict[str, Interval]:
    """The mean of each measure with half of its 95% interval over prompts; measures of the whole have no interval."""
    made = answers.made
    by_sample: dict[str, Sequence[float | None]] = {
        **(answers.measured or {}),
        "length": answers.lengths,
        "EOS": [float(s.ended) for s in made],
        "repetition": [texts.self_repetition(s.completion) for s in made],
        "refusals": [float(texts.refuses(s.completion)) for s in made],
    }
    if gold:
        verdicts = [world.gold(s.prompt, s.completion) for s in made]
        by_sample |= {name: [getattr(v, name) for v in verdicts] for name in GOLD}
    found = evaluation.summarize(by_sample, samples)
    whole = {f"distinct-{n}": texts.distinct((s.completion for s in made), n) for n in (1, 2)}
    if rewards := [reward for reward in answers.scores("reward") if reward is not None]:
        whole["reward spread"] = pstdev(rewards)
    return found | {name: Interval(value, float("nan")) for name, value in whole.items()}


def win_rates(
    answers: Mapping[str, Answers],
    baseline: str,
    judges: Sequence[Judge],
    categories: Sequence[str | None],
    samples: int,
    optimized: Callable[[str], frozenset[str]] = lambda _: frozenset(),
) -> list[dict[str, Any]]:
    """Each policy against the baseline by each judge.

    Args:
        categories: of each prompt; win rates are given by category too, where there are any.
        optimized: what identifies the rewards that a policy was trained on: as judges of it, or of what is compared
            with it, they are no evidence.
    """
    found = []
    for judge in judges:
        for name, policy in answers.items():
            if name == baseline:
                continue
            verdicts = judge.verdicts(policy, answers[baseline])
            # in characters: models may have different tokenizers
            pairs = zip(policy.made, answers[baseline].made, strict=True)
            longer = [len(a.completion) - len(b.completion) for a, b in pairs]
            decided = [verdict for verdict in verdicts if verdict is not None]
            found.append(
                {
                    "policy": name,
                    "baseline": baseline,
                    "judge": judge.name,
                    "evidence": not judge.marks & (optimized(name) | optimized(baseline)),
                    "win_rate": wins.win_rate(verdicts, samples),
                    "without_ties": wins.win_rate([None if v == 0.5 else v for v in verdicts], samples),
                    "length_controlled": wins.length_controlled(verdicts, longer, samples),
                    "not_controlled": wins.why_not_controlled(verdicts, longer),
                    "ties": decided.count(0.5) / len(decided) if decided else None,
                    "prompts": len(categories),
                    "failed": len(verdicts) - len(decided),
                    "categories": _by_category(verdicts, categories, samples),
                }
            )
    return found


def _by_category(
    verdicts: Sequence[float | None], categories: Sequence[str | None], samples: int
) -> dict[str, Rate | None]:
    members: dict[str, list[float | None]] = defaultdict(list)
    for number, category in enumerate(categories):
        if category is not None:
            members[category] += verdicts[number * samples : (number + 1) * samples]
    return {category: wins.win_rate(of, samples) for category, of in members.items()}


def best_of_n(found: Mapping[str, Mapping[str, Interval]], wanted: Sequence[int]) -> list[dict[str, Any]]:
    """The baseline that PPO has to justify itself against: the best of n SFT answers, and what it costs in KL."""
    return [
        {"n": n, "kl_bound": best_of_kl(n), "reward": of.get("reward"), "gold": of.get("gold")}
        for n, of in ((n, found[best_of_name(n)]) for n in wanted)
    ]


def of_run(cfg: DictConfig, run: RunModels, pairs: list[dict[str, Any]], tasks: Any) -> dict[str, Any]:
    """What is measured of the run's own models beside their answers: the reward model, and benchmarks.

    Args:
        pairs: what `reward_bench.pairs` gives.
        tasks: what `harness.tasks` gives.
    """
    found: dict[str, Any] = {}
    if (made := run.compared.reward_model) is not None:
        found["reward_model"] = _when_it_was_made(made.path)
        if pairs:
            found["reward_model"]["categories"] = reward_bench.by_category(cfg, run, pairs)
    if tasks is not None:
        found["benchmarks"] = harness.measure(cfg, run, tasks)
    return found


def _when_it_was_made(folder: Path) -> dict[str, Any]:
    """What `make rm` found of the reward model on held-out pairs."""
    metrics = json.loads((folder / "metrics.json").read_text())
    kept = ("accuracy", "calibration_error", "reliability", "pairs")
    found = {name: metrics[name] for name in kept if name in metrics}
    return found | ({"length_bias": {"accuracy": metrics["when_shorter"]}} if "when_shorter" in metrics else {})


def samples(cfg: DictConfig, answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """For every prompt the first completion of each policy, with what it scored."""
    each, gold = cfg.evaluation.samples, truth_is_known(cfg)
    prompts = [s.prompt for s in next(iter(answers.values())).made[::each]]
    rows = []
    for number, prompt in enumerate(prompts):
        completions = {}
        for name, of in answers.items():
            completion = of.made[number * each].completion
            rewards = of.scores("reward")
            completions[name] = {
                "text": completion,
                "reward": rewards[number * each] if rewards else None,
                "gold": world.gold(prompt, completion).score if gold else None,
            }
        rows.append({"prompt": text(prompt), "completions": completions})
    return rows


def tell(metrics: Mapping[str, Any]) -> str:
    """The tables for the terminal."""
    policies = metrics["policies"]
    there = list(dict.fromkeys(name for of in policies.values() for name in of))
    shown = [c for c in COLUMNS if c in there] + [name for name in there if name.startswith("rewards/")]
    parts = [figures.table([{"policy": name} | {c: of.get(c) for c in shown} for name, of in policies.items()])]
    if mark := figures.few(metrics["prompts"]["count"]):
        parts.append(f"Rough intervals{mark}")
    for name, looks in metrics.get("kept", {}).items():
        parts.append(
            f"{name} is the {looks} at held-out data, which flatters it here a little; eval.prompts asks others"
        )
    rows = [
        {
            f"against {metrics['baseline']}": f"{row['policy']} *" if not row["evidence"] else row["policy"],
            "judge": row["judge"],
            "wins": _percent(row["win_rate"]),
            "at equal length": _percent(row["length_controlled"]),
            "ties": None if row["ties"] is None else f"{row['ties']:.0%}",
            "wins without ties": _percent(row["without_ties"]),
            "failed": row["failed"] or None,
        }
        for row in metrics["win_rates"]
    ]
    if rows:
        parts.append(figures.table(rows))
    if any(not row["evidence"] for row in metrics["win_rates"]):
        parts.append("* by what one of the two was trained on, or picked by: no evidence")
    judged = {row["policy"] for row in metrics["win_rates"] if row["evidence"]}
    if alone := [name for name in policies if name not in (metrics["baseline"], *judged)]:
        parts.append(
            f"No judge here is evidence for {', '.join(alone)}. Name one that no training has seen: "
            "judge=reward_model, judge=function, judge=endpoint or judge=local."
        )
    for row in metrics["win_rates"]:
        if row["not_controlled"]:
            parts.append(
                f"- {row['policy']}, {row['judge']}: no win rate at equal length, since {row['not_controlled']}"
            )
        if row["failed"] > FAILED * row["prompts"] * metrics["prompts"]["samples"]:
            parts.append(
                f"! {row['judge']} gave no verdict on {row['failed']} answers of {row['policy']}: they count neither "
                "way, and may not be like the others"
            )
    for row in metrics["best_of_n"]:
        parts.append(f"best of {row['n']}: at most {row['kl_bound']:.2f} nats from SFT")
    if found := metrics.get("reward_model"):
        parts.append(_reward_model(found))
    for policy, tasks in metrics.get("benchmarks", {}).items():
        for task, of in tasks.items():
            parts.append(f"{policy}, {task}: " + ", ".join(f"{k} {v:.3f}" for k, v in of.items() if "stderr" not in k))
    return "\n\n".join(parts)


def _reward_model(found: Mapping[str, Any]) -> str:
    parts = [f"reward model: accuracy {figures.number(tuple(found['accuracy']))}"]
    parts.append(f"calibration error {found['calibration_error']:.3f}")
    if "length_bias" in found:
        parts.append(f"accuracy where the shorter is better {figures.number(tuple(found['length_bias']['accuracy']))}")
    rows = [{"category": name} | dict(of) for name, of in found.get("categories", {}).items()]
    return ", ".join(parts) + ("\n" + figures.table(rows) if rows else "")


def _percent(rate: Rate | None) -> str | None:
    if rate is None:
        return None
    ends = f" [{rate.low:.0%}, {rate.high:.0%}]" if rate.prompts > 1 else ""
    return f"{rate.mean:.0%}{ends}{figures.few(rate.prompts)}"
