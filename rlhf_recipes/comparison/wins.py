"""Win rates: with ties as half, with an interval over prompts, and with the length of answers taken out."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
RIDGE = 0.01
"""Pulls the effect of length towards none, by as much as a hundredth of an answer: where length decides every
comparison, the effect would be infinite."""

Array = NDArray[np.float64]


class Rate(NamedTuple):
    """A share with its 95% interval."""

    mean: float
    low: float
    high: float


def win_rate(verdicts: Sequence[float | None], samples: int, seed: int = 0) -> Rate | None:
    """Share of comparisons won, a tie counted as half; None where nothing was decided.

    Args:
        verdicts: (prompts x samples,) 1 for a win, 0.5 for a tie, 0 for a loss; None for a comparison that failed,
            which counts neither way. Samples of one prompt stand in a row, and are resampled together.
    """
    won, weight, _ = _by_prompt(verdicts, None, samples)
    if not len(won):
        return None

    def rate(draws: Array) -> Array:
        return (draws @ (won * weight).sum(axis=1)) / (draws @ weight.sum(axis=1))

    return _interval(rate, len(won), seed)


def length_controlled(
    verdicts: Sequence[float | None], longer: Sequence[float], samples: int, seed: int = 0
) -> Rate | None:
    """The win rate there would be, did answers of policy and baseline have one length; None without a difference.

    A logistic model of the verdict on tanh(difference / its standard deviation), read off at a difference of 0.
    Source: Dubois et al. (arXiv 2404.04475), equation 2, without the terms for single instructions.

    Args:
        longer: (prompts x samples,) by how many tokens each answer is longer than the baseline's.
    """
    won, weight, extra = _by_prompt(verdicts, longer, samples)
    spread = extra[weight > 0].std() if len(won) else 0.0
    if spread == 0:
        return None
    x = np.tanh(extra / spread)

    def rate(draws: Array) -> Array:
        return _logistic_at_zero(won.ravel(), x.ravel(), (draws[:, :, None] * weight).reshape(len(draws), -1))

    return _interval(rate, len(won), seed)


def _by_prompt(
    verdicts: Sequence[float | None], longer: Sequence[float] | None, samples: int
) -> tuple[Array, Array, Array]:
    """Verdicts, weights (0 for those that failed) and differences, (prompts, samples); undecided prompts left out."""
    found = np.array([np.nan if v is None else v for v in verdicts], dtype=float).reshape(-1, samples)
    extra = np.zeros_like(found) if longer is None else np.array(longer, dtype=float).reshape(-1, samples)
    decided = ~np.isnan(found)
    kept = decided.any(axis=1)
    return np.nan_to_num(found)[kept], decided[kept].astype(float), extra[kept]


def _interval(statistic: Callable[[Array], Array], prompts: int, seed: int) -> Rate:
    """A statistic of how often each prompt is drawn (r, prompts) -> (r,), with its percentile bootstrap interval."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES).astype(float)
    mean = float(statistic(np.ones((1, prompts)))[0])
    values = np.concatenate([statistic(part) for part in np.array_split(drawn, 20)])  # in parts: memory
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Rate(mean, float(low), float(high))


def _logistic_at_zero(won: Array, x: Array, weights: Array) -> Array:
    """Fits P(win) = sigmoid(a + b x) by Newton's method under each row of weights (r, n): sigmoid(a) (r,)."""
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(a[:, None] + b[:, None] * x, -30, 30)))
        residual, curvature = weights * (won - p), weights * np.maximum(p * (1 - p), 1e-9)
        gradient = residual.sum(1), (residual * x).sum(1) - RIDGE * b
        h_aa, h_ab, h_bb = curvature.sum(1), (curvature * x).sum(1), (curvature * x * x).sum(1) + RIDGE
        determinant = h_aa * h_bb - h_ab**2
        step_a = (h_bb * gradient[0] - h_ab * gradient[1]) / determinant
        step_b = (h_aa * gradient[1] - h_ab * gradient[0]) / determinant
        a, b = np.clip(a + np.clip(step_a, -2, 2), -30, 30), b + np.clip(step_b, -2, 2)
        if max(abs(step_a).max(), abs(step_b).max()) < 1e-8:
            break
    return 1 / (1 + np.exp(-a))
