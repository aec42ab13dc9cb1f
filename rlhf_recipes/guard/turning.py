"""When a score has turned down: the decision, on figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from statistics import NormalDist, fmean, stdev
from typing import Any

CONFIDENCE = 0.95

Halves = tuple[Sequence[float | None], Sequence[float | None]]
"""The mean score of each prompt on the first half of its samples, and on the second; None where there is no score."""


@dataclass(frozen=True)
class Point:
    """What one evaluation found."""

    step: int
    kl: float  # nats per completion, to the reference
    reward: float | None  # the training reward, on held-out data
    score: float  # the unseen scorer's
    objective: float | None = None  # that reward less the KL penalty, where there is one


@dataclass(frozen=True)
class Reference:
    """The best evaluation by one half of the samples: its mean there, and its scores by prompt on the other half."""

    chosen_by: float
    scores: list[float | None]


@dataclass(frozen=True)
class Turn:
    """The unseen score has turned down, and what training optimizes has not."""

    best: Point
    now: Point
    fall: float
    surely: float  # it is at least this, at 95%


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
    references: list[Reference] = field(default_factory=list)  # chosen on the first half of the samples, and the second

    def add(self, point: Point, halves: Halves) -> Turn | None:
        """Take in an evaluation: the mean score of each prompt, on either half of its samples. A turn if there is one.

        The best of many evaluations is best by luck too. So it is chosen on one half of the samples and measured on the
        other, and the other way round: whatever the luck, the fall from it is 0 in the mean where the policy is as good
        as it was. It is taken prompt by prompt, and has to be surely more than two things, by one-sided 95% bounds:
        than 0, by a bound that all planned evaluations share (Bonferroni: of 20 trainings that lose nothing, about one
        is told of at most), and than what is tolerated, by a bound of its own.

        Where the reward fell too, or does not pay for the KL that it took, training has wavered, and will itself turn
        back: that is no over-optimization.
        """
        self.points.append(point)
        if self.best is None or point.score > self.best.score:
            self.best = point
        chosen = [_mean(half) for half in halves]
        if not self.references:
            self.references = [Reference(chosen[0], list(halves[1])), Reference(chosen[1], list(halves[0]))]
            return None
        falls = _falls(self.references, halves)
        for i, (mean, measured) in enumerate(zip(chosen, reversed(halves), strict=True)):
            if mean > self.references[i].chosen_by:
                self.references[i] = Reference(mean, list(measured))
        if len(falls) < 2 or _lower(point.reward, self.best.reward) or _lower(point.objective, self.best.objective):
            return None
        fall, error = fmean(falls), stdev(falls) / len(falls) ** 0.5
        surely = fall - critical(2, len(falls)) * error
        if surely <= self.tolerance or fall <= critical(self.looks, len(falls)) * error:
            return None
        return Turn(self.best, point, fall, surely)

    def state(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> History:
        """The reverse of `state`."""
        best = state["best"] and Point(**state["best"])
        points, references = state["points"], state["references"]
        return cls(
            state["looks"], state["tolerance"], [Point(**p) for p in points], best, [Reference(**r) for r in references]
        )


def critical(looks: int, prompts: int) -> float:
    """Standard errors that a fall must exceed, so that in so many evaluations none does by chance.

    A quantile of Student's t, by its expansion in 1 / degrees of freedom (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / max(looks - 1, 1))
    return z + (z**3 + z) / (4 * (prompts - 1))


def _falls(references: Sequence[Reference], halves: Halves) -> list[float]:
    """Of each prompt that has a score in all of them, how far it fell, in the mean over the halves."""
    columns = zip(references[0].scores, halves[1], references[1].scores, halves[0], strict=True)
    known = [row for row in columns if None not in row]
    return [(row[0] - row[1] + row[2] - row[3]) / 2 for row in known]  # type: ignore[operator]


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return fmean(known) if known else -inf


def _lower(now: float | None, before: float | None) -> bool:
    return now is not None and before is not None and now < before
