"""The guard at work: at each evaluation of a trainer it answers the same prompts, scores them, and decides."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from omegaconf import DictConfig
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from rlhf_recipes import data, evaluation
from rlhf_recipes.errors import UserError
from rlhf_recipes.guard.scorer import Scorer
from rlhf_recipes.guard.turning import PROMPTS, History, Point, Turn
from rlhf_recipes.roles import POLICY, REFERENCE, Roles, check_padding

logger = logging.getLogger(__name__)

FILE = "guard.json"
REWARDS = ("eval_reward", "eval_rewards/margins")
"""What PPO and DPO say in an evaluation of what they optimize."""
STILL = 2
"""Evaluations after which a policy is looked at, however little its KL has moved: it may turn at one KL."""


def watch(
    trainer: Trainer,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    cfg: DictConfig,
    scorer: Scorer | None,
) -> "Guard":
    """Let a trainer's evaluations be guarded; with no scorer the guard is there, and does nothing."""
    guard = Guard(trainer, roles, tokenizer, cfg, scorer)
    if scorer is not None:
        for folder in scorer.sources.adapters:
            check_padding(folder, tokenizer)
        scorer.hold(roles)
        trainer.add_callback(guard)
    return guard


class Guard(TrainerCallback, ExportableState):
    """Adds `eval_guard` (the unseen score), `eval_guard_kl` and `eval_guard_reward` to a trainer's evaluations.

    A policy that has hardly moved since it was looked at last keeps its score, and is not written down again. Prompts
    and noise are the same each time, and training is the same as without: the random state is left alone. Its own state
    travels in the checkpoints, so that a resumed training decides as one that was not broken off.
    """

    def __init__(
        self,
        trainer: Trainer,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        cfg: DictConfig,
        scorer: Scorer | None,
    ) -> None:
        self.trainer, self.roles, self.tokenizer, self.cfg, self.scorer = trainer, roles, tokenizer, cfg, scorer
        self.prompts: Dataset | None = None
        self.history = History(looks=1, tolerance=0.0 if scorer is None else scorer.cfg.tolerance)
        self.warning: str | None = None
        self.certain = False  # whether the warning is one to stop at
        self.training = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        told = {"warning": self.warning, "certain": self.certain}
        return {"args": {}, "attributes": {"history": self.history.state(), **told}}

    @property
    def stop_reason(self) -> str | None:
        """Why training was stopped, if the guard did."""
        return self.warning if self.certain and self.scorer is not None and self.scorer.cfg.stop else None

    @property
    def figures(self) -> dict[str, object]:
        """For `metrics.json`: the warning, where there is a guard that did not stop."""
        return {} if self.scorer is None or self.stop_reason else {"over_optimized": self.warning}

    def save(self, folder: Path) -> None:
        """Write every evaluation to `guard.json`: step, KL, training reward and score; one process does."""
        if self.scorer is not None and PartialState().is_main_process:
            points = [asdict(point) for point in self.history.points]
            (folder / FILE).write_text(json.dumps({"scorer": self.scorer.name, "points": points}, indent=1) + "\n")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]  # of the checkpoint, in a resume
        self.history = History.from_state(saved["history"])
        self.warning, self.certain = saved["warning"], saved["certain"]
        looks = state.num_train_epochs if args.eval_strategy == "epoch" else state.max_steps / state.eval_steps
        self.history.looks = 1 + math.ceil(looks)
        self.training = True
        if self.scorer is not None:
            self._load_prompts(self.scorer)
        control.should_training_stop = self.stop_reason is not None
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        points, scorer = self.history.points, self.scorer
        if scorer is None or not self.training or metrics is None or (points and points[-1].step >= state.global_step):
            return control  # the last one after training, and the first one of a resume
        if points and not self._due(scorer, state, metrics.get("eval_kl")):
            metrics["eval_guard"] = points[-1].score  # the Trainer looks here for `metric_for_best_model`
            return control
        found = [self._measured(scorer, state.global_step, metrics) if state.is_world_process_zero else None]
        point, scores = broadcast_object_list(found)[0]
        figures = {"eval_guard": point.score, "eval_guard_kl": point.kl}
        if point.reward is not None:
            figures["eval_guard_reward"] = point.reward
        metrics.update(figures)
        self.trainer.log(dict(figures))
        turn = self.history.add(point, scores)
        if turn is not None and not self.certain and (self.warning is None or turn.stops):
            self.warning, self.certain = self._told(scorer, turn, args), turn.stops
            logger.warning(self.warning)
            control.should_training_stop = control.should_training_stop or self.stop_reason is not None
        return control

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.training = False

    def _due(self, scorer: Scorer, state: TrainerState, kl: float | None) -> bool:
        """Whether the policy may answer otherwise than when it was looked at last, by its KL where that is known."""
        last = self.history.points[-1]
        if kl is None or kl == last.kl == 0:  # DPO; while PPO's critic warms up
            return kl is None
        moved = abs(max(kl, 0) ** 0.5 - max(last.kl, 0) ** 0.5)  # a score goes with the root: Gao et al.
        return moved >= scorer.cfg.root_kl_step or state.global_step - last.step >= STILL * state.eval_steps

    def _load_prompts(self, scorer: Scorer) -> None:
        """The held-out prompts to answer, the same each time; raises UserError where they are too few."""
        if self.prompts is None:
            self.prompts = data.heldout_prompts(self.cfg, count=scorer.cfg.prompts)
            if self.prompts is not None:
                limit = getattr(self.trainer.args, "max_length", None)
                (self.prompts,), _ = data.fit({"guard's prompts": self.prompts}, self.tokenizer, limit)
        if (found := len(self.prompts or ())) < PROMPTS:
            raise UserError(
                f"guard: {found} held-out prompts are too few to tell a fall from noise; at least {PROMPTS}: give more "
                "data.prompts or a larger data.heldout, or guard=none"
            )

    def _measured(self, scorer: Scorer, step: int, metrics: dict[str, float]) -> tuple[Point, list[float | None]]:
        """The point of this evaluation, and the mean score of each prompt."""
        kl = metrics.get("eval_kl")  # PPO has just measured it
        reward = next((metrics[name] for name in REWARDS if name in metrics), None)
        options, size = scorer.cfg, self.cfg.evaluation.batch_size
        made = evaluation.sample(
            self.roles.model,
            self.tokenizer,
            self.prompts,
            samples=options.samples,
            max_new_tokens=self.cfg.evaluation.max_new_tokens,
            batch_size=size,
            seed=self.cfg.seed,
        )
        scores = scorer.scores(self.roles, self.tokenizer, made, size)
        by_prompt = [_mean(scores[start : start + options.samples]) for start in range(0, len(scores), options.samples)]
        score = _mean(by_prompt)
        if score is None:
            raise UserError(
                f"guard ({scorer.name}): none of the {len(scores)} completions at step {step} has a score (all are "
                "None or NaN). Nothing guards this training: mend the scorer, or guard=none"
            )
        if kl is None:
            first = made[:: options.samples]  # one of each prompt tells it well enough
            kl = fmean(evaluation.kl(self.roles, self.tokenizer, first, size, policy=POLICY, reference=REFERENCE))
        objective = metrics.get("eval_objective")
        return Point(step, kl, reward, score, objective if objective != -math.inf else None), by_prompt

    def _told(self, scorer: Scorer, turn: Turn, args: TrainingArguments) -> str:
        """A turn in words, with what to type."""
        best, now = turn.best, turn.now
        name, beta = scorer.name, getattr(args, "beta", 0)
        rewards = ""
        if best.reward is not None and now.reward is not None:
            rewards = f" while the training reward went from {best.reward:.3g} to {now.reward:.3g}"
        kept = "The policy at the start was better." if best.step == 0 else f"Step {best.step} was better."
        if args.load_best_model_at_end and best.step:
            kept = f"The checkpoint of step {best.step} is kept."
        what = f"training.beta={2 * beta:g}" if beta else "training.beta=0.1"
        stop = "Stopped." if scorer.cfg.stop else "guard.stop=true stops here."
        if not turn.stops:
            stop = "The reward less the KL penalty fell too, so training goes on: it may turn back by itself."
        return (
            f"over-optimization at step {now.step}: the guard's score ({name}) fell from {best.score:.3g} at step "
            f"{best.step} to {now.score:.3g} (by {turn.fall:.2g}, surely more than {turn.surely:.1g})"
            f"{rewards}, and the KL from {best.kl:.3g} to {now.kl:.3g} nats. {kept} {stop} A higher KL penalty keeps "
            f"closer to the start: {what} run=<new name>"
        )


def _mean(scores: Sequence[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return fmean(known) if known else None
