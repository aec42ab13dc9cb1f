"""Who says which of two answers is better: the truth, reward models, functions, or a model that is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from omegaconf import DictConfig

from rlhf_recipes import data, rewards, terminal
from rlhf_recipes.comparison import asking
from rlhf_recipes.comparison.policies import Compared, text
from rlhf_recipes.errors import UserError
from rlhf_recipes.guard.scorer import gold

if TYPE_CHECKING:
    from rlhf_recipes.comparison.answers import Answers

FROM_RUN = "the run's reward model"


class Judge(Protocol):
    """Compares a policy's answers with a baseline's."""

    name: str
    evidence: bool  # False: what training optimised, and so no witness to what it gained

    def verdicts(self, policy: Answers, baseline: Answers) -> list[float | None]:
        """For each sample 1 if the policy's is better, 0 if the baseline's is, 0.5 for a tie, None for no verdict."""


class Scores:
    """A judge that scores every answer by itself; None and NaN are no score.

    Raises:
        UserError: no answer of some policy has a score.
    """

    def __init__(self, name: str, scores: Mapping[str, Sequence[float | None]], *, evidence: bool = True):
        self.name, self.evidence = name, evidence
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
        self.name, self.evidence, self.asked = asked.name, asked.evidence, asked

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
            f"judge.reward_model={judge.reward_model} is the reward model that this run's training optimised. It "
            "is shown anyway, and is no evidence: name another."
        )


def open_endpoint(cfg: DictConfig, folder: Path) -> list[Judge]:
    """The judge behind an endpoint, where one is asked for; it is reached here, before any model is loaded."""
    return [Preferences(asking.endpoint(cfg.judge, folder))] if cfg.judge.url else []


def after_answers(cfg: DictConfig, answers: Mapping[str, Answers], folder: Path) -> list[Judge]:
    """All judges but an endpoint: what the answers tell of themselves, and the one that the config names."""
    judges: list[Judge] = []
    if truth_is_known(cfg):
        judges.append(Scores("gold", {name: rewards.called(gold, of.made) for name, of in answers.items()}))
    if all("reward" in (of.measured or {}) for of in answers.values()):
        scores = {name: (of.measured or {})["reward"] for name, of in answers.items()}
        judges.append(Scores(FROM_RUN, scores, evidence=False))
    if cfg.judge.function:
        judges.append(
            Scores(
                cfg.judge.function,
                {name: rewards.called(rewards.function(cfg.judge.function), of.made) for name, of in answers.items()},
            )
        )
    if cfg.judge.reward_model:
        judges.append(Scores(cfg.judge.reward_model, _scored(cfg, answers)))
    if cfg.judge.model and not cfg.judge.url:
        judges.append(Preferences(asking.local(cfg, folder)))
    return judges


def truth_is_known(cfg: DictConfig) -> bool:
    """Whether the prompts are those of the embedded world, whose truth is known."""
    return cfg.eval.prompts is None and data.is_world(cfg.data)


def _scored(cfg: DictConfig, answers: Mapping[str, Answers]) -> dict[str, list[float | None]]:
    """The scores of another reward model: an adapter on the run's base, or a sequence classifier of its own."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    from rlhf_recipes import evaluation, models
    from rlhf_recipes.comparison.answers import as_seen_by

    path = cfg.judge.reward_model
    terminal.say(f"{path}: scoring the answers ...")
    prompts = Dataset.from_list([{"prompt": next(iter(answers.values())).made[0].prompt}])
    size = cfg.evaluation.batch_size
    if (Path(path) / "adapter_config.json").exists():
        tokenizer = models.load_tokenizer(cfg.model, prompts)
        roles = models.load_scorer(cfg, Path(path))
        return {
            name: evaluation.rewards(roles, tokenizer, [as_seen_by(tokenizer, s) for s in of.made], size)
            for name, of in answers.items()
        }
    own = models.with_model(cfg, path)
    tokenizer = models.load_tokenizer(own.model, prompts)
    with models.loading(own.model):
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=models.dtype(own.model), num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id  # by which it finds the token that it scores
    return {
        name: evaluation.classifier_scores(model.eval(), tokenizer, [as_seen_by(tokenizer, s) for s in of.made], size)
        for name, of in answers.items()
    }
