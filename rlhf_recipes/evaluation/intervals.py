"""Means of measures over prompts, with their 95% intervals."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import nan
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

GOLD = ("helpful", "honest", "harmless")
"""What a known truth says of a completion; each prompt asks for one of them."""
RATES = frozenset({*GOLD, "EOS", "refusals", "repetition"})
"""Measures between 0 and 1, of which many may be 0 or 1 altogether."""
LEVEL = 0.95


class Interval(NamedTuple):
    """A mean, and half of its 95% interval."""

    mean: float
    half_width: float


class Rate(NamedTuple):
    """A share with its 95% interval, and the number of prompts that it comes of."""

    mean: float
    low: float
    high: float
    prompts: int

    def around_mean(self) -> Interval:
        """The narrowest interval around the mean that holds this one."""
        return Interval(self.mean, max(self.mean - self.low, self.high - self.mean))


def summarize(
    measured: Mapping[str, Sequence[float | None]], samples: int, rates: Collection[str] = RATES
) -> dict[str, Interval]:
    """The mean of each measure over prompts with its 95% interval, from `samples` values in a row for each prompt.

    Samples of one prompt are not independent, so prompts are what is counted. None is left out: not every measure
    applies to every prompt. `gold` is the mean of its components, however many prompts of each kind there are.

    Args:
        rates: the measures whose values lie between 0 and 1.
    """
    figures = {}
    for name, values in measured.items():
        groups = [values[start : start + samples] for start in range(0, len(values), samples)]
        by_prompt = [[v for v in group if v is not None] for group in groups]
        if any(by_prompt):
            means = [fmean(group) for group in by_prompt if group]
            figures[name] = rate(means).around_mean() if name in rates else interval(means)
    parts = [figures[name] for name in GOLD if name in figures]
    if parts:
        half_width = sum(part.half_width**2 for part in parts) ** 0.5 / len(parts)
        figures = {"gold": Interval(fmean(part.mean for part in parts), half_width)} | figures
    return figures


def interval(values: Iterable[float]) -> Interval:
    """Mean and half of the 95% interval of independent values, by Student's t; one value has none (NaN)."""
    values = list(values)
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else nan
    return Interval(fmean(values), t_quantile(len(values)) * error)


def rate(sums: Sequence[float], counts: Sequence[float] | None = None) -> Rate:
    """A share over prompts with its 95% interval, which has a width where all values are 0 or all are 1 too.

    Wilson's interval for as many independent prompts as vary as much: values of one prompt are not independent, and
    vary less than wins and losses do where they are means or hold ties. How much less is a noisy estimate if prompts
    are few; it counts as that of one prompt less a half, beside half a prompt whose values are all equal. One prompt
    has no interval (NaN).

    Args:
        sums: of the values (0 to 1) of each prompt.
        counts: how many values each prompt has; by default one.

    Source: Wilson (1927); for samples in clusters Franco et al. (2019), doi 10.1093/jssam/smy019. Measured in
    benchmarks/results/simulations.md.
    """
    won = np.asarray(sums, dtype=float)
    of = np.ones_like(won) if counts is None else np.asarray(counts, dtype=float)
    n, mean = len(won), float(won.sum() / of.sum())
    if n == 1:
        return Rate(mean, nan, nan, n)
    equal = float(of.sum() ** 2 / (of**2).sum())  # as many prompts of equal counts
    variance = float(((won - mean * of) ** 2).sum() / of.sum() ** 2) * n / (n - 1)
    coin = mean * (1 - mean) / equal  # the variance of as many wins and losses
    share = min(variance / coin, 1.0) if coin else 1.0
    effective = equal / (((n - 1) * share + 0.5) / (n - 0.5))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle, scale = mean + z**2 / (2 * effective), 1 + z**2 / effective
    half = z * (mean * (1 - mean) / effective + z**2 / (4 * effective**2)) ** 0.5
    return Rate(mean, max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0), n)


def t_quantile(values: int) -> float:
    """Standard errors on either side of the mean of so many values that a 95% interval reaches; NaN for one."""
    return float(stdtrit(values - 1, (1 + LEVEL) / 2)) if values > 1 else nan
