"""Win rates: with ties as half, with an interval over prompts, and with the length of answers taken out."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rlhf_recipes.evaluation.intervals import Rate, rate, t_quantile

RIDGE = 0.01
"""Pulls the effect of length towards none, by as much as a hundredth of an answer: where length decides every
comparison, the effect would be infinite."""
BOTH_WAYS = 0.05
"""Share of the answers that have to be the longer ones, and the shorter ones: a win rate at equal length is read off
between them, and nothing is known there if one side is always longer."""

Array = NDArray[np.float64]


def win_rate(verdicts: Sequence[float | None], samples: int) -> Rate | None:
    """Share of comparisons won, a tie counted as half; None where nothing was decided.

    Args:
        verdicts: (prompts x samples,) 1 for a win, 0.5 for a tie, 0 for a loss; None for a comparison that failed,
            which counts neither way. Samples of one prompt stand in a row.
    """
    won, decided, _ = _by_prompt(verdicts, None, samples)
    return rate((won * decided).sum(axis=1), decided.sum(axis=1)) if len(won) else None


def length_controlled(verdicts: Sequence[float | None], longer: Sequence[float], samples: int) -> Rate | None:
    """The win rate there would be, did answers of policy and baseline have one length; None where that is unknown.

    A logistic model of the verdict on tanh(difference / its root mean square), read off at a difference of 0. Source:
    Dubois et al. (arXiv 2404.04475), equation 2, without the terms for single instructions. The interval is that of
    Student's t around the intercept, whose variance is taken over prompts (Liang and Zeger, 1986). One comparison is
    added, a tie at equal lengths, so that it has a width where one side wins all.

    Args:
        longer: (prompts x samples,) by how many characters each answer is longer than the baseline's.
    """
    if why_not_controlled(verdicts, longer) is not None:
        return None
    won, decided, extra = _by_prompt(verdicts, longer, samples)
    n = len(won)
    x = np.tanh(extra / np.sqrt((decided * extra**2).sum() / decided.sum()))
    covariates = np.stack([np.ones_like(x), x])  # (2, prompts, samples)
    tie, ridge = np.diag([1.0, 0.0]), np.diag([0.0, RIDGE])
    found = np.zeros(2)
    for _ in range(50):  # Newton's method
        p, at_0 = expit(np.tensordot(found, covariates, 1)), expit(found[0])
        residual, curvature = decided * (won - p), decided * p * (1 - p)
        gradient = (residual * covariates).sum(axis=(1, 2)) + tie @ [0.5 - at_0, 0] - ridge @ found
        hessian = np.einsum("aps,bps,ps->ab", covariates, covariates, curvature) + tie * at_0 * (1 - at_0) + ridge
        step = np.clip(np.linalg.solve(hessian, gradient), -2, 2)
        found += step
        if abs(step).max() < 1e-8:
            break
    by_prompt = (residual * covariates).sum(axis=2)
    spread = by_prompt @ by_prompt.T * n / max(n - 1, 1) + tie * 0.25
    error = t_quantile(n) * float(np.linalg.solve(hessian, np.linalg.solve(hessian, spread).T)[0, 0]) ** 0.5
    mean, low, high = expit(found[0] + np.array([0, -error, error])).tolist()
    return Rate(mean, low, high, n)


def why_not_controlled(verdicts: Sequence[float | None], longer: Sequence[float]) -> str | None:
    """Why there is no win rate at equal length; None if there is one. Arguments as of `length_controlled`."""
    of = np.array([extra for extra, verdict in zip(longer, verdicts, strict=True) if verdict is not None])
    if not len(of):
        return "nothing was decided"
    shares = {"longer": (of > 0).mean(), "shorter": (of < 0).mean()}
    if not of.any():
        return "all answers have the length of the baseline's"
    if min(shares.values()) < BOTH_WAYS:
        rare = min(shares, key=lambda side: shares[side])
        return f"only {shares[rare]:.1%} of the answers are {rare} than the baseline's"
    return None


def _by_prompt(
    verdicts: Sequence[float | None], longer: Sequence[float] | None, samples: int
) -> tuple[Array, Array, Array]:
    """Of prompts with a verdict: verdicts, which are decided (1, else 0), and differences; each (prompts, samples)."""
    found = np.array([np.nan if v is None else v for v in verdicts], dtype=float).reshape(-1, samples)
    extra = np.zeros_like(found) if longer is None else np.array(longer, dtype=float).reshape(-1, samples)
    decided = ~np.isnan(found)
    kept = decided.any(axis=1)
    return np.nan_to_num(found)[kept], decided[kept].astype(float), extra[kept]
