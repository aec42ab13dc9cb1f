"""What a stage changed: completions of several policies on the same held-out prompts, measured side by side."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rlhf_recipes import data, world
from rlhf_recipes.evaluation import scoring
from rlhf_recipes.evaluation.intervals import GOLD, RATES, Interval, summarize
from rlhf_recipes.evaluation.measures import kl
from rlhf_recipes.evaluation.sampling import Sample, sample
from rlhf_recipes.evaluation.scoring import Scores
from rlhf_recipes.rewards import Rewards
from rlhf_recipes.roles import POLICY, REFERENCE, Roles

logger = logging.getLogger(__name__)

SCORES = "scores"
"""The key of a sample that holds what its completions scored, and no completion."""


@dataclass(frozen=True)
class Changes:
    """Policies side by side on the same held-out prompts."""

    figures: dict[str, dict[str, Interval]]  # by policy, then by measure; `change` is the last policy less the first
    samples: list[dict[str, Any]]  # a prompt and, by policy, the first completion of it; its `scores` by policy


def changes(
    cfg: DictConfig,
    asked: Dataset | None,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    policies: Mapping[str, str | None],
    reward: Rewards | None = None,
) -> Changes:
    """What several policies answer to the same held-out prompts with the same noise, and how good that is.

    Args:
        asked: what `data.heldout_prompts` gives; None where the data have no prompts, and the result is empty.
        policies: the adapter of each policy, by the name to show; None is the bare base. The KL is taken to the
            reference where there is one, and else to the policy.
        reward: what PPO optimised, as the measure `reward`; of several sources each has a measure of its own, too.
    """
    if asked is None:
        return Changes({}, [])
    options = cfg.evaluation
    gold = world.gold if data.is_world(cfg.data) else None
    reference = REFERENCE if REFERENCE in roles.model.peft_config else POLICY
    values: dict[str, dict[str, Sequence[float | None]]] = {}
    samples: list[dict[str, Any]] = [{"prompt": _last_words(row["prompt"])} for row in asked]
    scores: list[dict[str, Any]] = [{} for _ in samples]
    for name, adapter in policies.items():
        with roles.active(adapter):
            made = sample(
                roles.model,
                tokenizer,
                asked,
                samples=options.samples,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                seed=cfg.seed,
            )
        measured = values[name] = {
            "KL to SFT": kl(roles, tokenizer, made, options.batch_size, policy=adapter, reference=reference),
            "length": [float(len(s.completion_ids)) for s in made],
            "EOS": [float(s.ended) for s in made],
        }
        if reward is not None:
            measured |= _rewards(reward, roles, tokenizer, made, options.batch_size)
        if gold is not None:
            verdicts = [gold(s.prompt, s.completion) for s in made]
            measured |= {name: [getattr(v, name) for v in verdicts] for name in GOLD}
        shown = {"reward": measured["reward"]} if "reward" in measured else {}
        shown |= {"gold": [v.score for v in verdicts]} if gold is not None else {}
        for number, (row, s) in enumerate(zip(samples, made[:: options.samples], strict=True)):
            row[name] = s.completion
            scores[number][name] = {key: column[number * options.samples] for key, column in shown.items()}
    if shown:
        samples = [row | {SCORES: of} for row, of in zip(samples, scores, strict=True)]
    # prompt by prompt, so that what is hard for both policies does not widen the interval
    if len(values) > 1:
        first, *_, last = values.values()
        values["change"] = {name: _differences(first[name], last[name]) for name in last if name in first}
    rates = {name: () if name == "change" else RATES for name in values}  # differences may be negative
    found = {name: summarize(measured, options.samples, rates[name]) for name, measured in values.items()}
    return Changes(found, samples)


def _rewards(
    reward: Rewards, roles: Roles, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample], size: int
) -> dict[str, Scores]:
    """A function of somebody else's that fails here, after training, costs its column and not the stage."""
    try:
        found = scoring.by_source(reward, roles, tokenizer, made, size)
    except Exception as error:
        logger.warning("the reward is left out of the table: %s: %s", type(error).__name__, error)
        return {}
    parts = {f"rewards/{name}": scores for name, scores in found.items()} if len(found) > 1 else {}
    return {"reward": scoring.total(found.values(), reward.weights)} | parts


def _differences(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]


def _last_words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
