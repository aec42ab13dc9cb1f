"""Stops a training at its first number that is NaN or infinite, before a step, a checkpoint or an artefact takes it."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf_recipes.errors import UserError

ROWS, BEGIN, END = 32, 70, 50  # rows that a message shows, and the characters of each: of its begin and of its end
SKIPS = 20  # fp16's loss scale begins at 2^16 and halves at each skipped step
SKIPPED = "skipped_steps"
"""What the log calls the optimizer steps that fp16's GradScaler has skipped so far."""


class StopAtNonFinite(TrainerCallback):
    """Shadows four methods of a trainer; attach it after all else that does.

    Losses and gradient norm are looked at once for each optimizer step, in one transfer from the GPU; weights at each
    save. A step that fp16's GradScaler skips, as its loss scale was too high, is counted in the log.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.skipped = self.in_a_row = 0
        self.overflowed = False  # whether fp16's scaler will skip the step at work
        self.rows: list[Tensor] = []  # ids (b, s) of the micro-batch at work, one tensor for each part of a text
        self.micro_batches: list[tuple[list[Tensor], Tensor]] = []  # of this step: rows, and the loss
        self._step, self._loss, self._norm = trainer.training_step, trainer.compute_loss, trainer._get_grad_norm
        self._save, self._log = trainer.save_model, trainer.log
        trainer.training_step, trainer.compute_loss = self.training_step, self.compute_loss
        trainer._get_grad_norm, trainer.save_model, trainer.log = self._get_grad_norm, self.save_model, self.log
        trainer.args.logging_nan_inf_filter = False  # it would log the losses before in the place of a NaN
        trainer.add_callback(self)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's own, of a micro-batch whose rows are remembered."""
        if model.training:
            self.rows = [inputs[name] for name in ("input_ids", "prompt_ids", "completion_ids") if name in inputs]
        return self._loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, whose loss is remembered."""
        loss: Tensor = self._step(*args, **kwargs)
        self.micro_batches.append((self.rows, loss.detach()))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = self._norm(model, grad_norm=grad_norm)
        (batches, losses), self.micro_batches = zip(*self.micro_batches, strict=True), []
        *found, last = torch.stack([*losses, torch.as_tensor(norm, device=losses[0].device)]).tolist()
        bad = [number for number, loss in enumerate(found) if not math.isfinite(loss)]
        if bad:
            raise self.error("the loss", found[bad[0]], [batches[number] for number in bad])
        self.refuse_norm("the gradient norm", last, batches)
        return norm

    @property
    def rows_of_step(self) -> list[list[Tensor]]:
        """Ids of the micro-batches of this step so far."""
        return [rows for rows, _ in self.micro_batches]

    def refuse_norm(self, name: str, norm: float, batches: Iterable[list[Tensor]] = ()) -> None:
        """Raise for a gradient norm that is not finite, unless the optimizer's step will be skipped for it."""
        if math.isfinite(norm):
            return
        scaler = self.trainer.accelerator.scaler
        if scaler is None or not scaler.is_enabled() or self.in_a_row >= SKIPS:
            raise self.error(name, norm, batches)
        self.overflowed = True

    def count(self) -> None:
        """Count the step that was just taken, or skipped. (Accelerate takes what a fused optimizer skips for taken.)"""
        self.skipped += self.overflowed
        self.in_a_row = self.in_a_row + 1 if self.overflowed else 0
        self.overflowed = False

    def refuse(self, name: str, values: Tensor, ids: Tensor, mask: Tensor | None = None) -> None:
        """Raise for values (b, t) or (b,) of the texts `ids` (b, s) that are not finite, where the mask (b, t) is."""
        bad = ~values.isfinite() if mask is None else ~values.isfinite() & mask
        if bad.any():
            rows = bad.reshape(len(bad), -1).any(dim=1)
            raise self.error(name, values[bad][0].item(), [[ids[rows]]])

    def error(self, name: str, value: float, batches: Iterable[list[Tensor]] = ()) -> UserError:
        """What to say of a number that is not finite: the step, the rows, what may have caused it, and how to go on."""
        lines = [f"{name} became {value} at step {self.trainer.state.global_step}."]
        if bad := non_finite([*self.trainer.model.named_parameters(), *_heads(self.trainer)]):
            lines.append(f"The weights themselves hold NaN or infinity: {some(bad)}.")
        texts = [text for rows in batches for text in self._texts(rows)]
        lines += ["Its rows:"] * bool(texts) + [f"  {text}" for text in texts[:ROWS]]
        lines += [f"  ... and {len(texts) - ROWS} more"] * (len(texts) > ROWS)
        return UserError("\n".join([*lines, how_to_go_on(Path(self.trainer.args.output_dir))]))

    def _texts(self, rows: list[Tensor]) -> Iterator[str]:
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
        for text in tokenizer.batch_decode(torch.cat(rows, dim=1), skip_special_tokens=True):
            text = " ".join(text.split())
            yield text if len(text) <= BEGIN + END else f"{text[:BEGIN]} ... {text[-END:]}"

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own, of weights that are finite.

        Raises:
            UserError: they are not.
        """
        groups = self.trainer.optimizer.param_groups if self.trainer.optimizer else []
        weights = [p.detach() for group in groups for p in group["params"]]
        if weights and not torch.nn.utils.get_total_norm(weights).isfinite():
            raise self.error("the norm of the trained weights", math.nan)
        self._save(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's own, with the steps that were skipped, once there are any."""
        self._log(logs | {SKIPPED: self.skipped} if self.skipped else logs, *args, **kwargs)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.skipped = skipped_steps(state.log_history)
        self.micro_batches = []

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.count()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Raise for a loss of held-out rows that is not finite."""
        loss = (metrics or {}).get("eval_loss", 0.0)
        if not math.isfinite(loss):
            raise self.error("the loss on held-out rows", loss)


def skipped_steps(log: Iterable[Mapping[str, Any]]) -> int:
    """How many optimizer steps fp16's GradScaler has skipped, by a trainer's log history."""
    return max((int(row.get(SKIPPED, 0)) for row in log), default=0)


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that hold NaN or infinity."""
    floating = ((name, x.detach()) for name, x in tensors if x.is_floating_point())
    return [name for name, x in floating if not (x if x.element_size() > 1 else x.float()).isfinite().all()]


def saved_non_finite(files: Iterable[Path]) -> list[str]:
    """What holds NaN or infinity in saved weights (*.safetensors) and scales (head.json)."""
    found = []
    for file in files:
        if file.suffix == ".safetensors":
            with contextlib.suppress(SafetensorError), safe_open(file, "pt") as saved:  # else it is no such file
                found += non_finite((name, saved.get_tensor(name)) for name in saved.keys())  # noqa: SIM118
        elif file.name == "head.json":
            found += [n for n, value in json.loads(file.read_text()).items() if not math.isfinite(value)]
    return found


def refuse_saved(files: Iterable[Path], checkpoints: Path) -> None:
    """Raise if artefacts that are to be published hold NaN or infinity.

    Raises:
        UserError: with the tensors, and the last good checkpoint.
    """
    if bad := saved_non_finite(files):
        raise UserError(
            f"what was trained holds NaN or infinity, and the stage is not finished: {some(bad)}.\n"
            f"{how_to_go_on(checkpoints)}"
        )


def how_to_go_on(checkpoints: Path) -> str:
    """The last checkpoint whose weights are finite, and what to type."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    good = next(
        (number for number, p in enumerate(found) if not saved_non_finite(p.rglob("*.safetensors"))), len(found)
    )
    spoilt = f"Remove {', '.join(str(p) for p in found[:good])}, whose weights are not finite. " if good else ""
    begin = "No good checkpoint was saved yet: the same command starts again."
    if good < len(found):
        begin = (
            f"{found[good]} is the last good checkpoint: the same command goes on from it (in a script: "
            "trainer.train(resume_from_checkpoint=True))."
        )
    return (
        f"{spoilt}{begin} If it ends here again, leave out these rows, or lower training.learning_rate, with "
        "run=<new name> or overwrite=true."
    )


def _heads(trainer: Any) -> list[tuple[str, Tensor]]:
    """PPO's heads, which are not in the model."""
    heads = trainer.roles.heads.items() if hasattr(trainer, "roles") else ()
    return [(f"{role}.{name}", weight) for role, head in heads for name, weight in head.named_parameters()]


def some(names: list[str]) -> str:
    """The first of many names."""
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
