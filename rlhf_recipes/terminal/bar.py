"""The progress of a trainer: one bar with rate, time left and the figures that matter, or plain lines in a log."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_recipes.figures import duration, number
from rlhf_recipes.terminal.lines import say

# What the bar shows, by stage: the trainer's name for a figure, and ours.
FIGURES = {
    "sft": {"loss": "loss", "mean_token_accuracy": "accuracy"},
    "rm": {"loss": "loss", "accuracy": "accuracy", "margin": "margin"},
    "dpo": {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"},
    "ppo": {"reward": "reward", "kl": "KL", "completions/mean_length": "length"},
}
BAR = "{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
SILENCE = 300.0  # seconds after which a log gets a line, even before the next tenth


class Progress(TrainerCallback):
    """Follows a training and its evaluations; of several processes the first alone speaks.

    The rate is the mean since the start or the resume, so that it does not jump where a rollout serves several steps.
    """

    def __init__(self, stage: str, *, bar: bool) -> None:
        self.stage = stage
        self.as_bar = bar
        self.bar: Any = None
        self.evaluation: Any = None
        self.figures = ""
        self.first = self.tenth = 0
        self.per_iteration = 0  # steps that one rollout batch serves, in PPO
        self.begun = self.spoken = time.monotonic()
        self.due = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.per_iteration = getattr(args, "steps_per_iteration", 0)
        self.first, self.tenth = state.global_step, state.global_step * 10 // state.max_steps
        self.begun = self.spoken = time.monotonic()
        if self.as_bar:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.stage,
                unit="step",
                bar_format=BAR,
                smoothing=0,
                leave=True,
                delay=0,
                dynamic_ncols=True,
            )

    def on_step_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **kwargs: Any) -> None:
        self._speak(state)  # if no log came after the step that was to be told

    def on_step_end(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        tenth = state.global_step * 10 // state.max_steps
        self.due = tenth > self.tenth or time.monotonic() - self.spoken > SILENCE
        self.tenth = tenth

    def on_log(
        self,
        _: TrainingArguments,
        state: TrainerState,
        __: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        shown = {ours: logs[theirs] for theirs, ours in FIGURES.get(self.stage, {}).items() if theirs in logs}
        if shown and not (self.figures and "train_runtime" in logs):  # the trainer's closing words have no loss
            self.figures = ", ".join(f"{name} {number(value)}" for name, value in shown.items())
        if self.bar is not None:
            self.bar.set_postfix_str(_joined(self._iteration(state), self.figures))
        self._speak(state)

    def on_prediction_step(
        self,
        _: TrainingArguments,
        state: TrainerState,
        __: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if not (self.as_bar and state.is_world_process_zero):
            return
        if self.evaluation is None and hasattr(eval_dataloader, "__len__"):
            self.evaluation = tqdm(
                total=len(eval_dataloader),
                desc="evaluation",
                unit="batch",
                leave=False,
                delay=1,
                dynamic_ncols=True,
            )
        if self.evaluation is not None:
            self.evaluation.update()

    def on_evaluate(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **kwargs: Any) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
            self.evaluation = None

    def on_train_end(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **kwargs: Any) -> None:
        self._speak(state)
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _speak(self, state: TrainerState) -> None:
        """The line for a log, if one is due."""
        if not self.due or self.as_bar or not state.is_world_process_zero:
            return
        self.due = False
        self.spoken = time.monotonic()
        done = state.global_step - self.first
        rate = done / max(self.spoken - self.begun, 1e-9)
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        left = state.max_steps - state.global_step
        time_left = f"{duration(left / rate)} left" if left else f"{duration(self.spoken - self.begun)} in all"
        step = f"step {state.global_step} of {state.max_steps}"
        say(f"{self.stage}: {_joined(step, self._iteration(state), self.figures, speed, time_left)}")

    def _iteration(self, state: TrainerState) -> str:
        """In PPO, which rollout batch this is; empty elsewhere."""
        if not self.per_iteration:
            return ""
        return f"iteration {-(-state.global_step // self.per_iteration)} of {-(-state.max_steps // self.per_iteration)}"


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
