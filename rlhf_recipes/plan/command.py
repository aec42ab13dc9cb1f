"""The command line of `make plan`, and what it tells a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlhf_recipes.config import by_stage
from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.errors import UserError
from rlhf_recipes.machine import GB, Card
from rlhf_recipes.runs.commands import make_variable

if TYPE_CHECKING:
    from rlhf_recipes.plan.stages import Plan

CONTEXT = 0.6
"""GB of a card that CUDA and its libraries take: an assumption, like the next."""
FRAGMENTS = 0.05
"""Share of a card that its allocator loses in pieces too small to use."""
SHARED = ("quantization", "trunk")
"""Overrides on which all stages have to agree."""


@dataclass(frozen=True)
class Asked:
    """What is to be planned: overrides of all stages, those of each, the card in GB, and the prompts' tokens.

    Of a card that is there, `free` bytes are: a plan counts on those, and not on its nominal size.
    """

    common: list[str]
    own: dict[str, list[str]]
    card: float | None = None
    prompt: int = 512
    free: int | None = None

    def on(self, card: Card | None) -> Asked:
        """The same on this machine's card, unless another was asked for."""
        return self if card is None or self.card else replace(self, card=card.total / GB, free=card.free)

    def overrides(self, stage: str) -> list[str]:
        """What make hands to a stage."""
        return [*self.common, *self.own[stage]]

    @property
    def limit(self) -> int | None:
        """Bytes that a plan may take on the card."""
        if self.card is None:
            return None
        free = (self.card - CONTEXT) * GB if self.free is None else self.free  # CUDA's own part is taken from it by now
        return int(free - self.card * FRAGMENTS * GB)


def parse(arguments: Sequence[str], story: str) -> Asked:
    """`card=12 prompt=512 <overrides of all stages> --sft <its own> --rm ... --dpo ... --ppo ...`.

    Raises:
        UserError: card or prompt is no positive number.
    """
    given, common, own = by_stage("plan", story, arguments, keys=("card", "prompt"), stages=[*TRAINING])
    try:
        card, prompt = float(given["card"]) if "card" in given else None, int(given.get("prompt", 512))
    except ValueError as error:
        raise UserError(f"card (GB) and prompt (tokens) are numbers: {error}") from error
    if prompt < 1 or (card is not None and card <= 0):
        raise UserError(f"card (GB) and prompt (tokens) are more than 0; here card={card} prompt={prompt}")
    return Asked(common, own, card, prompt)


def row(plan: Plan, limit: int | None) -> dict[str, str]:
    """The line of a stage in the table, in GB."""
    cells = {part: f"{size / GB:.2f}" if size else "-" for part, size in plan.parts.items()}
    fits = {} if limit is None else {"fits": "yes" if plan.peak <= limit else "no"}
    return {"GB": plan.stage, **cells, "peak": f"{plan.peak / GB:.2f}", **fits, "comes in": plan.phase}


def assumptions(asked: Asked) -> str:
    """What the table takes for granted."""
    text = f"Texts as long as training.max_length, with a loss on every token; prompts of {asked.prompt} tokens where "
    text += "answers are sampled (prompt=...)."
    if asked.card is None or asked.limit is None:
        return f"{text} CARD=12 tells what fits into 12 GB."
    if asked.free is not None:
        return (
            f"{text} Of this card's {asked.card:.1f} GB, {asked.free / GB:.1f} are free now and {asked.limit / GB:.1f} "
            f"are counted on: {FRAGMENTS:.0%} are lost in fragments. CARD=12 tells of another."
        )
    return (
        f"{text} Of {asked.card:g} GB, {asked.limit / GB:.1f} are counted on: {CONTEXT:g} GB go to CUDA, "
        f"{FRAGMENTS:.0%} are lost in fragments."
    )


def advice(asked: Asked, tried: Mapping[str, Mapping[str, str] | None], stages: Iterable[str] = TRAINING) -> str:
    """The make line under which all stages fit, from the overrides that were found for those that do not.

    Args:
        stages: those that the line makes, and all where the overrides are such that all have to agree on them.
    """
    hopeless = [stage for stage, extra in tried.items() if extra is None]
    lines = [f"{stage}: fits with nothing that was tried; take a smaller model or larger card." for stage in hopeless]
    extra = {stage: found for stage, found in tried.items() if found}
    if extra:
        shared = {key: value for found in extra.values() for key, value in found.items() if key in SHARED}
        line = "make " + " ".join(stage for stage in (TRAINING if shared else stages) if stage not in hopeless)
        line += make_variable("ARGS", with_overrides(asked.common, shared))
        for stage, own in asked.own.items():
            found = extra.get(stage, {})
            alone = {key: value for key, value in found.items() if key not in SHARED}
            kept = [o for o in own if _key(o) not in shared]
            line += "" if stage in hopeless else make_variable(f"{stage.upper()}_ARGS", with_overrides(kept, alone))
        lines += [f"{', '.join(extra)}: fits by this line (planned again, not measured):", f"  {line}"]
    return "\n".join(lines)


def with_overrides(overrides: Sequence[str], extra: Mapping[str, str]) -> list[str]:
    """Overrides with some more, in place of earlier ones of the same keys."""
    return [o for o in overrides if _key(o) not in extra] + [f"{key}={value}" for key, value in extra.items()]


def _key(override: str) -> str:
    return override.lstrip("+").split("=")[0]
