"""Who says which of two answers is better: the truth, reward models, functions, or a model that is asked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from omegaconf import DictConfig

from rlhf_recipes import data, rewards, terminal
from rlhf_recipes.comparison import asking
from rlhf_recipes.comparison.policies import FROM_RUN, Compared, text
from rlhf_recipes.errors import UserError
from rlhf_recipes.guard.scorer import gold

if TYPE_CHECKING:
    from rlhf_recipes.comparison.answers import Answers

__all__ = ["FROM_RUN"]
GOLD = "rlhf_recipes.guard.scorer:gold"


class Judge(Protocol):
    """Compares a policy's answers with a baseline's."""

    name: str
    marks: frozenset[str]  # what identifies it: for a policy that was trained on it, it is no witness to what it gained

    def verdicts(self, policy: Answers, baseline: Answers) -> list[float | None]:
        """For each sample 1 if the policy's is better, 0 if the baseline's is, 0.5 for a tie, None for no verdict."""


class Scores:
    """A judge that scores every answer by itself; None and NaN are no score.

    Raises:
        UserError: no answer of some policy has a score.
    """

    def __init__(self, name: str, scores: Mapping[str, Sequence[float | None]], marks: Iterable[str] = ()):
        self.name, self.marks = name, frozenset(marks)
        self.scores = {policy: [math.nan if s is None else s for s in of] for policy, of in scores.items()}
        for policy, of in self.scores.items():
            if of and all(map(math.isnan, of)):
                raise UserError(f"{name} scores none of the {len(of)} answers of {policy} (all are None or NaN)")

    def verdicts(self, policy: Answers, baseline: Answers) -> list[float | None]:
        """See `Judge`."""
        pairs = zip(self.scores[policy.name], self.scores[baseline.name], strict=True)
        return [None if a != a or b != b else (a > b) + 0.5 * (a == b) for a, b in pairs]


class Preferences:
    """A judge that is asked about two answers."""

    def __init__(self, asked: asking.Asked):
        self.name, self.marks, self.asked = asked.name, frozenset([asked.mark]), asked

    def verdicts(self, policy: Answers, baseline: Answers) -> list[float | None]:
        """See `Judge`."""
        prompts = [text(sample.prompt) for sample in policy.made]
        return self.asked.verdicts(prompts, *([s.completion for s in of.made] for of in (policy, baseline)))


def refuse_faults(cfg: DictConfig, compared: Compared) -> None:
    """Check what can be checked of the judge before any model is loaded.

    Raises:
        UserError: more than one judge, one without what it needs, or the reward model that training optimised.
    """
    judge = cfg.judge
    kinds = [kind for kind in ("url", "reward_model", "function") if judge[kind]]
    if judge.url and not judge.model:
        raise UserError("judge.url needs judge.model=<the model's name there>")
    if len(kinds) > 1 or (judge.model and kinds and not judge.url):
        raise UserError(f"judge: one at a time; set are {', '.join(kinds + ['model'] * bool(judge.model))}")
    if judge.function:
        rewards.function(judge.function)
    own = compared.reward_model
    if judge.reward_model and own and rewards.mark(Path(judge.reward_model)) == rewards.mark(own.path):
        raise UserError(
            f"judge.reward_model={judge.reward_model} is the run's own reward model, which judges without being asked. "
            "For what PPO optimised it is no evidence: name another."
        )


def open_endpoint(cfg: DictConfig, folder: Path) -> list[Judge]:
    """The judge behind an endpoint, where one is asked for; it is reached here, before any model is loaded."""
    return [Preferences(asking.endpoint(cfg.judge, folder))] if cfg.judge.url else []


def after_answers(cfg: DictConfig, compared: Compared, answers: Mapping[str, Answers], folder: Path) -> list[Judge]:
    """All judges but an endpoint: what the answers tell of themselves, and the one that the config names."""
    judges: list[Judge] = []
    if truth_is_known(cfg):
        scores = {name: rewards.called(gold, of.made) for name, of in answers.items()}
        judges.append(Scores("gold", scores, [rewards.function_mark(GOLD)]))
    named = [rewards.function_mark(cfg.judge.function)] if cfg.judge.function else []
    for reward in compared.rewards:
        found = {name: of.scores(reward.measure) for name, of in answers.items()}
        if all(found.values()) and reward.marks != {*named}:
            judges.append(Scores(reward.name, found, reward.marks))
    if cfg.judge.function:
        by = rewards.function(cfg.judge.function)
        called = {name: rewards.called(by, of.made) for name, of in answers.items()}
        judges.append(Scores(cfg.judge.function, called, named))
    if cfg.judge.reward_model:
        scored = _scored(cfg, answers)
        judges.append(Scores(cfg.judge.reward_model, scored, [rewards.mark(Path(cfg.judge.reward_model))]))
    if cfg.judge.model and not cfg.judge.url:
        judges.append(Preferences(asking.local(cfg, folder)))
    return judges


def truth_is_known(cfg: DictConfig) -> bool:
    """Whether the prompts are those of the embedded world, whose truth is known."""
    return cfg.eval.prompts is None and data.is_world(cfg.data)


def _scored(cfg: DictConfig, answers: Mapping[str, Answers]) -> dict[str, Sequence[float | None]]:
    """The scores of another reward model: an adapter on the run's base, or a sequence classifier of its own."""
    from datasets import Dataset

    from rlhf_recipes import evaluation, models
    from rlhf_recipes.evaluation.sampling import as_seen_by
    from rlhf_recipes.evaluation.scoring import scored

    path, size = cfg.judge.reward_model, cfg.evaluation.batch_size
    terminal.say(f"{path}: scoring the answers ...")
    if (Path(path) / rewards.ADAPTER_CONFIG).exists():
        prompts = Dataset.from_list([{"prompt": next(iter(answers.values())).made[0].prompt}])
        tokenizer, roles = models.load_tokenizer(cfg.model, prompts), models.load_scorer(cfg, Path(path))
        return {
            name: evaluation.rewards(roles, tokenizer, [as_seen_by(tokenizer, s) for s in of.made], size)
            for name, of in answers.items()
        }
    classifier = models.load_classifier(cfg, path)
    return {name: scored(classifier, of.made, size) for name, of in answers.items()}
