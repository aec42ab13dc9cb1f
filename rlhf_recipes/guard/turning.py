"""When a score has turned down: the decision, on figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist, fmean, stdev
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Point:
    """What one evaluation found."""

    step: int
    kl: float  # nats per completion, to the reference
    reward: float | None  # what the training optimizes, on held-out data
    score: float  # the unseen scorer's


@dataclass(frozen=True)
class Turn:
    """The unseen score has turned down, and the training reward has not."""

    best: Point
    now: Point
    fall: float
    half_width: float  # the fall is at least fall - half_width


@dataclass
class History:
    """The evaluations of a training, and the scores of each prompt at the best of them.

    Args:
        looks: evaluations that are planned.
    """

    looks: int
    points: list[Point] = field(default_factory=list)
    best: Point | None = None
    best_scores: list[float | None] = field(default_factory=list)

    def add(self, point: Point, scores: Sequence[float | None]) -> Turn | None:
        """Take in an evaluation, with the mean score of each prompt; a turn if there is one.

        The score has turned where the fall from its best evaluation, taken prompt by prompt, is surely above 0. The
        best of many evaluations is best by luck too, and many more are held against it: so all pairs of the planned
        evaluations share the 5% of false alarms (Bonferroni), one-sided.
        """
        self.points.append(point)
        if self.best is None or point.score > self.best.score:
            self.best, self.best_scores = point, list(scores)
            return None
        pairs = zip(self.best_scores, scores, strict=True)
        falls = [before - now for before, now in pairs if before is not None and now is not None]
        half_width = critical(self.looks) * stdev(falls) / len(falls) ** 0.5 if len(falls) > 1 else float("inf")
        fall = fmean(falls) if falls else 0.0
        if fall <= half_width or _lower(point.reward, self.best.reward):
            return None
        return Turn(self.best, point, fall, half_width)

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        """The reverse of `state`."""
        best = state["best"] and Point(**state["best"])
        return cls(state["looks"], [Point(**point) for point in state["points"]], best, state["best_scores"])


def critical(looks: int) -> float:
    """Standard errors that a fall must exceed, so that none of the pairs of so many evaluations does by chance."""
    pairs = max(looks * (looks - 1) // 2, 1)
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / pairs)


def _lower(now: float | None, before: float | None) -> bool:
    return now is not None and before is not None and now < before
