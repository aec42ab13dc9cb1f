"""The arithmetic of PPO as pure functions on tensors: KL penalty, rewards per token, GAE, whitening, value loss.

Notation in every docstring: `b` sequences in a batch, `t` tokens of a completion, padded on the right. A `mask` (b, t)
is True at the completion's own tokens, EOS included. Log-probabilities, rewards, values and masks agree on the index:
position `i` speaks of the i-th completion token, and its value is that of the state *before* the token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes (`accelerator.reduce`); the identity where there is only one."""


def alone(x: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return x


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards per token (b, t): minus the KL penalty everywhere, plus the score (b,) at the last token.

    The penalty is log p - log q of the sampled token ("k1"): the one estimator whose policy gradient, taken through the
    reward, is that of the KL (arXiv 2512.21852). Source: InstructGPT (arXiv 2203.02155), equation 2, with the penalty
    paid where it is caused.
    """
    rewards = -kl_coef * (logps - ref_logps) * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_token(mask)] += scores
    return rewards


def last_token(mask: Tensor) -> Tensor:
    """Index (b,) of the last True of each row; 0 for a row without any."""
    positions = torch.arange(mask.size(1), device=mask.device)
    return (positions * mask).argmax(dim=1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimates (b, t): A_i = sum over k of (gamma lam)^k (r + gamma V' - V)_{i+k}.

    0 outside the mask. The episode ends at its last token, so V after it is 0. Source: arXiv 1506.02438, equation 16.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running)
    for i in range(values.size(1) - 1, -1, -1):
        delta = rewards[:, i] + gamma * following - values[:, i]
        running = (delta + gamma * lam * running) * mask[:, i]
        following = values[:, i]
        advantages[:, i] = running
    return advantages


def masked_moments(x: Tensor, mask: Tensor, reduce: Reduce = alone) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance of `x` where `mask` is True, over all processes."""
    # two passes, as a sum of squares loses small variances in float32; float64 does not exist on every device
    count = reduce(mask.sum().float()).clamp(min=1)
    mean = reduce((x * mask).sum()) / count
    return mean, reduce(((x - mean) ** 2 * mask).sum()) / count


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = alone, *, shift_mean: bool = True) -> Tensor:
    """`x` (b, t) scaled to variance 1 over the mask, and to mean 0 unless `shift_mean` is False; 0 outside the mask."""
    mean, variance = masked_moments(x, mask, reduce)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return ((whitened if shift_mean else whitened + mean) * mask).to(x.dtype)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = alone) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 knows only a mean, below 0 does harm.

    NaN where all returns are equal: there is nothing to explain.
    """
    mean, variance = masked_moments(returns, mask, reduce)
    _, residual = masked_moments(returns - values, mask, reduce)
    return float(1 - residual / variance) if variance > 1e-12 * mean**2 else math.nan


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Squared error per token (b, t), halved; with `clip`, the worse of the plain and the clipped one.

    Source: the PPO reference implementation, https://github.com/openai/baselines/blob/master/baselines/ppo2/model.py
    """
    loss = (values - returns) ** 2
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped - returns) ** 2)
    return 0.5 * loss


@dataclass
class ReturnScale:
    """Mean and standard deviation of the returns so far: the critic predicts returns in these units.

    Without them the critic's learning rate, gradient clipping and clip range would mean something else for each scale
    of the reward. Source: PopArt (arXiv 1602.07714); the statistics are a moving mean over rollout batches.
    """

    mean: float = 0.0
    variance: float = 0.0
    batches: int = 0

    @property
    def std(self) -> float:
        """1 where all returns were equal."""
        return math.sqrt(self.variance) or 1.0

    def update(self, mean: float, variance: float) -> None:
        """Take in a rollout batch whose returns have this mean and variance; the first one counts in full."""
        self.batches += 1
        weight = max(1 / self.batches, 0.1)
        moved = mean - self.mean
        self.mean += weight * moved
        # of the mixture: within both parts, and between their means
        self.variance = (1 - weight) * self.variance + weight * variance + weight * (1 - weight) * moved**2

    def normalized(self, x: Tensor) -> Tensor:
        """Returns or values in units of the critic."""
        return (x - self.mean) / self.std

    def restored(self, x: Tensor) -> Tensor:
        """What the critic predicts, in units of the reward."""
        return x * self.std + self.mean


@dataclass
class KLController:
    """The KL coefficient: fixed, or moved towards a target KL per sequence in nats.

    Source: Ziegler et al. (arXiv 1909.08593), section 2.2.
    """

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        """Take notice of a rollout batch of `episodes` with a mean KL per sequence of `kl`."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * episodes / self.horizon
