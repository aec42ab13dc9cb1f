"""When a score has turned down: the decision, on figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import comb
from typing import Any

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
PROMPTS = 8
"""Prompts without which nothing is decided: the noise of a fall is estimated from how prompts differ in it."""


@dataclass(frozen=True)
class Point:
    """What one evaluation found."""

    step: int
    kl: float  # nats per completion, to the reference
    reward: float | None  # the training reward, on held-out data
    score: float  # the unseen scorer's
    objective: float | None = None  # that reward less the KL penalty, where there is one


@dataclass(frozen=True)
class Turn:
    """The unseen score has turned down, and what training optimizes has not."""

    best: Point
    now: Point
    fall: float
    surely: float  # it is at least this, at 95% for all evaluations of the training together
    stops: bool = True  # False: the objective is lower too, so that training itself may turn back


@dataclass
class History:
    """The evaluations of a training, and what the next one is held against.

    Args:
        looks: evaluations that are planned.
        tolerance: how far the score may fall, in its own unit: a policy in training wavers.
    """

    looks: int
    tolerance: float = 0.0
    points: list[Point] = field(default_factory=list)
    best: Point | None = None
    reference: list[float | None] = field(default_factory=list)  # the scores of the best evaluation, by prompt

    def add(self, point: Point, scores: Sequence[float | None]) -> Turn | None:
        """Take in an evaluation with the score of each prompt, None where it has none. A turn if there is one.

        The fall from the best evaluation is taken prompt by prompt, since policies differ by prompt and samples of one
        prompt are not independent. It has to be surely more than two things, by one-sided 95% bounds on its mean over
        prompts: than what is tolerated, by a bound of its own, and than 0, by a bound that all pairs of the planned
        evaluations share (Bonferroni). The best of many is best by luck too and looks as if it fell afterwards; but
        whichever it is, it and this one are a pair, so of 20 trainings that lose nothing, one is told of at most.

        Where the reward fell too, training has wavered, and will itself turn back: that is no over-optimization. Where
        only the reward less the KL penalty fell, it may turn back or may not: that is a turn that does not stop.
        """
        self.points.append(point)
        best, reference = self.best, self.reference
        if best is None or point.score > best.score:
            self.best, self.reference = point, list(scores)
        if best is None or _lower(point.reward, best.reward):
            return None
        falls = np.array(reference, dtype=float) - np.array(scores, dtype=float)  # None becomes NaN
        falls = falls[~np.isnan(falls)]
        if len(falls) < PROMPTS:
            return None
        fall, error = float(falls.mean()), float(falls.std(ddof=1)) / len(falls) ** 0.5
        surely = fall - critical(self.looks, len(falls)) * error
        if surely <= 0 or fall - critical(2, len(falls)) * error <= self.tolerance:
            return None
        return Turn(best, point, fall, surely, stops=not _lower(point.objective, best.objective))

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        """The reverse of `state`."""
        best, points = state["best"] and Point(**state["best"]), [Point(**point) for point in state["points"]]
        return cls(**state | {"points": points, "best": best})


def critical(looks: int, prompts: int) -> float:
    """Standard errors that a fall must exceed, so that between no two of so many evaluations it does by chance."""
    return float(stdtrit(prompts - 1, 1 - (1 - CONFIDENCE) / max(comb(looks, 2), 1)))


def _lower(now: float | None, before: float | None) -> bool:
    return now is not None and before is not None and now < before
