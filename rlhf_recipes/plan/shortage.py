"""What a run says that ended because the GPU's memory was too small: the plan's figures, and what makes it fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig

from rlhf_recipes import machine
from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.errors import OutOfMemory, UserError, first_sentence, ran_out_of_memory
from rlhf_recipes.plan.command import Asked, advice
from rlhf_recipes.runs.commands import typed_overrides

if TYPE_CHECKING:
    from rlhf_recipes.plan.stages import Plan
    from rlhf_recipes.runs import Stage

T = TypeVar("T")


def told_when_full(train: Callable[[DictConfig, Stage], T]) -> Callable[[DictConfig, Stage], T]:
    """Lets `train(cfg, stage)` end with the figures of `make plan` where nothing could avoid running out of memory.

    Raises:
        UserError: in place of that error.
    """

    @functools.wraps(train)
    def told(cfg: DictConfig, stage: Stage) -> T:
        try:
            return train(cfg, stage)
        except Exception as error:
            if (reason := _reason(error)) is None:
                raise
            lines = [reason]
            try:
                card = machine.card()
                lines += _figures(stage.name, cfg, card.total / machine.GB if card else None)
            except Exception as unplanned:  # whatever it is, it must not hide why the run ended
                lines.append(f"`make plan` cannot tell what it takes: {unplanned}")
            raise UserError("\n".join(lines)) from error

    return told


def _reason(error: Exception) -> str | None:
    """A plain message for an error that says the GPU's memory is full; None for any other error."""
    if isinstance(error, OutOfMemory):
        return str(error)
    return f"out of memory ({first_sentence(error)})." if ran_out_of_memory(error) else None


def _figures(stage: str, cfg: DictConfig, card: float | None) -> Iterator[str]:
    """Lines that say what the stage takes by the plan, of a card of some GB, and the command under which it fits."""
    from rlhf_recipes.plan.overrides import overrides_that_fit
    from rlhf_recipes.plan.stages import phases

    asked = Asked(typed_overrides(), {name: [] for name in TRAINING}, card)
    found = phases(stage, cfg, prompt_length=asked.prompt)
    most = max(found, key=lambda phase: phase.peak)
    yield f"By `make plan`, {stage} takes {_told(most)}, with the longest texts and prompts of {asked.prompt} tokens."
    if asked.limit is None:
        return
    if most.peak <= asked.limit:
        yield (
            f"That fits into {card:.0f} GB: another program may hold a part of it (nvidia-smi), or prompts are longer "
            f"(make plan CARD={card:.0f}, with prompt=<tokens> in ARGS)."
        )
        return
    yield advice(asked, {stage: overrides_that_fit(found, asked.common, asked.limit)}, [stage])


def _told(plan: Plan) -> str:
    """The peak of a plan and its largest parts."""
    parts = sorted(((size, part) for part, size in plan.parts.items() if size), reverse=True)
    largest = ", ".join(f"{part} {size / machine.GB:.2f}" for size, part in parts[:4])
    return f"{plan.peak / machine.GB:.2f} GB at its peak ({plan.phase}: {largest})"
