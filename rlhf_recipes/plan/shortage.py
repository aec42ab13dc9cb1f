"""What a run says that ended because the GPU's memory was too small: the plan's figures, and what makes it fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.errors import OutOfMemory, UserError
from rlhf_recipes.plan.command import Asked, advice
from rlhf_recipes.runs.commands import typed_overrides

if TYPE_CHECKING:
    from rlhf_recipes.plan.stages import Plan


@contextmanager
def told_when_full(stage: str, cfg: DictConfig) -> Iterator[None]:
    """Inside, an out-of-memory error that nothing could avoid ends as a message with the figures of `make plan`.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except Exception as error:
        torch = sys.modules.get("torch")
        if not isinstance(error, OutOfMemory) and (torch is None or not isinstance(error, torch.OutOfMemoryError)):
            raise
        lines = [str(error) if isinstance(error, OutOfMemory) else f"out of GPU memory ({_first_sentence(error)})."]
        try:
            lines += _figures(stage, cfg, _card())
        except Exception as unplanned:  # whatever it is, it must not hide why the run ended
            lines.append(f"`make plan` cannot tell what it takes: {unplanned}")
        raise UserError("\n".join(lines)) from error


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
    largest = ", ".join(f"{part} {size / 2**30:.2f}" for size, part in parts[:4])
    return f"{plan.peak / 2**30:.2f} GB at its peak ({plan.phase}: {largest})"


def _card() -> float | None:
    """GB of the GPU; None where there is none of CUDA's."""
    import torch

    return torch.cuda.get_device_properties().total_memory / 2**30 if torch.cuda.is_available() else None


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0]
