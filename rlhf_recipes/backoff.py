"""Goes on after the GPU ran out of memory: what was too large is computed in parts, and comes out the same."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.errors import OutOfMemory, first_sentence, ran_out_of_memory

logger = logging.getLogger(__name__)

Inputs = dict[str, Any]
IGNORED = -100  # label of a token that does not count, as in all of transformers

ADVICE = (
    "Shorten the sequences (training.max_length; in PPO training.max_completion_length), raise trunk, or add "
    "quantization=nf4 or training.gradient_checkpointing=true."
)


def back_off(trainer: Any, *, pairs: bool = False) -> None:
    """Let a trainer split its micro-batches from the first out-of-memory error on, where it has one GPU to itself.

    Args:
        pairs: its batches hold all chosen answers and then all rejected ones, and its loss is a mean over the pairs.
    """
    full_without_notice = trainer.args.device.type in ("cpu", "mps")  # no OutOfMemoryError comes from there
    if not full_without_notice and trainer.accelerator.num_processes == 1:
        BackOff(trainer, pairs=pairs)


class BackOff:
    """Shadows three methods of a trainer: a step that fails is taken again, on as many parts as it needs.

    Gradients of the micro-batches before are put aside meanwhile, and added when the step has succeeded: nothing is
    copied. (Losses that compare the rows of a micro-batch with each other, DPO's `aot` and `bco_pair`, see smaller ones
    from then on.)
    """

    def __init__(self, trainer: Any, *, pairs: bool = False) -> None:
        self.trainer = trainer
        self.pairs = pairs
        self.parts = 1  # that a micro-batch is computed in
        self.prepared: Inputs | None = None  # the micro-batch of this step, on the device
        self._step, self._loss, self._prepare = trainer.training_step, trainer.compute_loss, trainer._prepare_inputs
        trainer.training_step, trainer.compute_loss = self.training_step, self.compute_loss
        trainer._prepare_inputs = self._prepare_inputs

    def training_step(self, model: Any, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, again and again until it fits.

        Raises:
            OutOfMemory: one sequence alone is too much.
        """
        parameters = [p for group in self.trainer.optimizer.param_groups for p in group["params"]]
        before = [(p, p.grad) for p in parameters if p.grad is not None]

        def forget() -> None:
            for parameter in parameters:
                parameter.grad = None

        forget()
        try:
            while True:
                try:
                    loss = self._step(model, inputs, *args, **kwargs)
                    break
                except Exception as error:
                    if self.prepared is None or not ran_out_of_memory(error):
                        raise
                    reason = first_sentence(error)
                self._split_further(reason)  # out of the handler: the failed step's tensors are free by now
                forget()
                torch.cuda.empty_cache()
        finally:
            self.prepared = None
        for parameter, gradient in before:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return loss

    def _prepare_inputs(self, inputs: Inputs) -> Inputs:
        if not self.trainer.model.training:
            return dict(self._prepare(inputs))
        if self.prepared is None:
            self.prepared = self._prepare(inputs)
        return self.prepared

    def _split_further(self, reason: str) -> None:
        rows, step = self._rows(), self.trainer.state.global_step
        if self.parts >= rows:
            raise OutOfMemory(f"out of GPU memory at step {step} with one sequence at a time ({reason}). {ADVICE}")
        self.parts = min(2 * self.parts, rows)
        logger.warning(
            "out of GPU memory at step %d (%s): from here on, micro-batches of %d are computed in %d parts. The result "
            "is the same; a smaller per_device_train_batch_size with more gradient_accumulation_steps saves the try.",
            *(step, reason, rows, self.parts),
        )

    def compute_loss(self, model: Any, inputs: Inputs, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss; of a split micro-batch, all parts but the last go backward here."""
        if self.parts == 1 or not model.training:
            return self._loss(model, inputs, *args, **kwargs)
        done = torch.zeros((), device=self.trainer.args.device)
        items = kwargs.get("num_items_in_batch")
        *first, last = self._split(inputs, items)
        for part, share in first:
            loss = share * self._loss(model, part, *args, **kwargs)
            self.trainer.accelerator.backward(loss / self._divisor(items))
            done += loss.detach()
        part, share = last
        return share * self._loss(model, part, *args, **kwargs) + done

    def _divisor(self, items: Any) -> int:
        """What `Trainer.training_step` divides a loss by before it goes backward."""
        trainer = self.trainer
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        return 1 if scaled else int(trainer.current_gradient_accumulation_steps)

    def _rows(self) -> int:
        sizes = [len(value) for value in (self.prepared or {}).values() if isinstance(value, Tensor) and value.ndim]
        return min(sizes) // (2 if self.pairs and len(set(sizes)) == 1 else 1)

    def _split(self, inputs: Inputs, items: Any) -> Iterator[tuple[Inputs, float]]:
        """The parts of a micro-batch, each with its share in the loss, where that is a mean over pairs or tokens."""
        rows = self._rows()
        for chunk in torch.arange(rows).tensor_split(self.parts):
            start, stop = int(chunk[0]), int(chunk[-1]) + 1
            part = {name: self._cut(value, rows, slice(start, stop)) for name, value in inputs.items()}
            share = (stop - start) / rows if self.pairs else 1.0
            if "labels" in inputs and items is None:
                share = float((part["labels"] != IGNORED).sum() / (inputs["labels"] != IGNORED).sum())
            yield part, share

    def _cut(self, value: Any, rows: int, cut: slice) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return torch.cat([half[cut] for half in value.chunk(2)]) if len(value) == 2 * rows else value[cut]


def in_chunks(rows: int, size: int, compute: Callable[[slice], Any]) -> tuple[list[Any], int]:
    """`compute` on slices of `size` rows each, halved whenever the GPU runs out of memory.

    Returns:
        What it gave for each slice, and the size that fitted, to begin with the next time.

    Raises:
        OutOfMemory: one row alone is too much.
    """
    done: list[Any] = []
    start = 0

    def next_slice(size: int) -> Any:
        return compute(slice(start, start + size))

    while start < rows:
        part, size = until_it_fits(rows, size, next_slice)
        done.append(part)
        start += size
    return done, size


def until_it_fits(rows: int, size: int, compute: Callable[[int], Any]) -> tuple[Any, int]:
    """`compute(size)`, of at most `rows` at once, with `size` halved whenever the GPU's memory is too small for it.

    Returns:
        What it gave, and the size that fitted.

    Raises:
        OutOfMemory: one row alone is too much.
    """
    while True:
        try:
            return compute(size), size
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            reason = first_sentence(error)
        if size == 1:
            raise OutOfMemory(f"out of GPU memory with one sequence at a time ({reason}). {ADVICE}")
        size = min(size, rows) // 2
        logger.warning("out of GPU memory (%s): going on with %d sequences at once", reason, size)
        torch.cuda.empty_cache()
