"""Means of measures over prompts, with their 95% intervals."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

GOLD = ("helpful", "honest", "harmless")
"""What a known truth says of a completion; each prompt asks for one of them."""


class Interval(NamedTuple):
    """A mean, and half of its 95% interval."""

    mean: float
    half_width: float


def summarize(measured: Mapping[str, Sequence[float | None]], samples: int) -> dict[str, Interval]:
    """The mean of each measure over prompts with its 95% interval, from `samples` values in a row for each prompt.

    Samples of one prompt are not independent, so prompts are what is counted. None is left out: not every measure
    applies to every prompt. `gold` is the mean of its components, however many prompts of each kind there are.
    """
    figures = {}
    for name, values in measured.items():
        groups = [values[start : start + samples] for start in range(0, len(values), samples)]
        by_prompt = [[v for v in group if v is not None] for group in groups]
        if any(by_prompt):
            figures[name] = interval([fmean(group) for group in by_prompt if group])
    parts = [figures[name] for name in GOLD if name in figures]
    if parts:
        half_width = sum(part.half_width**2 for part in parts) ** 0.5 / len(parts)
        figures = {"gold": Interval(fmean(part.mean for part in parts), half_width)} | figures
    return figures


def interval(values: Iterable[float]) -> Interval:
    """Mean and half of the 95% interval of independent values (normal approximation)."""
    values = list(values)
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Interval(fmean(values), 1.96 * error)
