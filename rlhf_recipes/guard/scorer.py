"""Who judges: the sources of the `guard` section, none of which the training may optimize."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_recipes import data, machine, rewards, world
from rlhf_recipes.errors import UserError
from rlhf_recipes.rewards import Rewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_recipes.evaluation import Sample
    from rlhf_recipes.roles import Roles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scorer:
    """Scores completions by reward adapters, which it holds as the role `guard`, and by functions, with weights."""

    name: str
    sources: Rewards
    cfg: DictConfig  # the `guard` section

    def hold(self, roles: Roles) -> None:
        """Put the reward adapters on the base, and leave the random state and what trains as they are."""
        from rlhf_recipes.ensembles import Ensemble
        from rlhf_recipes.roles import GUARD

        if self.sources.adapters:
            with machine.random_state_kept():
                roles.hold(GUARD, self.sources.adapters, Ensemble(self.cfg.ensemble, self.cfg.spread_coef))
            roles.share_trunk(GUARD)

    def scores(
        self, roles: Roles, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample], batch_size: int
    ) -> list[float | None]:
        """One score for each sample, the weighted sum of the sources; None where none of them gives a finite one."""
        from rlhf_recipes.evaluation import scoring
        from rlhf_recipes.roles import GUARD

        columns = scoring.by_source(self.sources, roles, tokenizer, made, batch_size, role=GUARD)
        return scoring.total(columns.values(), self.sources.weights)


def from_config(cfg: DictConfig, run_model: Path | None) -> Scorer | None:
    """The scorer that the `guard` section asks for; None for `guard=none`.

    Args:
        cfg: the config of a recipe that has the section.
        run_model: folder of the run's own reward model.

    Raises:
        UserError: as for rewards; there is no gold scorer for these data, no prompts, or the scorer is (part of) what
            the training optimizes.
    """
    asked = cfg.guard
    names = rewards.named_models(asked.model) + [str(_path(f)) for f in asked.functions or []]
    names += [rewards.shown_url(url) for url in [asked.url] if url is not None] + ["gold"] * asked.gold
    if not names:
        return None
    sources = rewards.from_config(asked, run_model, "guard")
    faults = [
        f"guard.model: {source} is no reward adapter on this base, and a classifier of its own would be a second base "
        "in memory; serve it, and use guard=url"
        for source in sources.functions
        if isinstance(source, str)
    ]
    prompts = data.parse(cfg.data, "prompts")[0] if cfg.data.prompts else []
    if not prompts:
        faults.append("guard: it needs prompts to answer; set data.prompts.path=<file or hub id>")
    if asked.gold:
        if prompts and not data.is_world(cfg.data):
            faults.append(
                "guard=gold knows the embedded world alone; guard=reward_model, function or url for your data"
            )
        sources.functions.append(gold)
        sources.weights.append(1.0)
        sources.names.append("gold")
    if "reward" in cfg:
        faults += _seen(cfg, run_model)
    if faults:
        raise UserError("\n".join(faults))
    return Scorer(", ".join(names), sources, asked)


def gold(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | None]:
    """The embedded world's truth as a reward function: 1 is right, 0.5 right but ill formed, 0 wrong."""
    return [world.gold(prompt, completion).score for prompt, completion in zip(prompts, completions, strict=True)]


def _seen(cfg: DictConfig, run_model: Path | None) -> list[str]:
    """Which of the sources the training optimizes, a line each."""
    trained = {
        mark: f"{name} of reward.{source.key}"
        for source in rewards.sources(cfg.reward, run_model)
        for mark, name in source.marks.items()
    }
    same = [
        f"guard.{source.key}: {name} is {trained[mark]}"
        for source in rewards.sources(cfg.guard, run_model)
        for mark, name in source.marks.items()
        if mark in trained
    ]
    why = (
        "which PPO optimizes: its score rises whatever the answers become. Guard with what training never sees, "
        "such as a reward model of another seed (python -m recipes.rm -m run=<run> seed=8,9)"
    )
    return [f"{fault}, {why}" for fault in same]


def _path(function: Any) -> Any:
    return function if isinstance(function, str) else function.get("path")
