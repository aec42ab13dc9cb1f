"""Log-probabilities of tokens from logits, where TRL's fused LM head does not serve: PPO on a CPU, and evaluation."""

from typing import Any

import torch
from torch import Tensor


class TokenLogps(torch.autograd.Function):
    """Log-probabilities and entropies (b, t), in float32, of tokens (b, t) under logits (b, t, vocabulary).

    The logits are the largest tensor of a PPO step. They are held once: the backward pass turns them into their own
    gradient, row by row, so nobody else may need them afterwards. No gradient comes from the entropies; where the
    logits take none, the entropies are None: who scores has no use for them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Row by row, so that no second tensor of the logits' size is made."""
        normalizers = torch.stack([row.float().logsumexp(-1) for row in logits])
        logps = logits.gather(-1, tokens[..., None])[..., 0].float() - normalizers
        if not ctx.needs_input_grad[0]:
            return logps, None
        entropies = torch.stack([_entropy(row - z[:, None]) for row, z in zip(logits, normalizers, strict=True)])
        ctx.save_for_backward(logits, tokens, normalizers)
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        """Of the chosen token's logit 1 - p, of any other's -p, times the gradient of the log-probability."""
        logits, tokens, normalizers = ctx.saved_tensors
        for row, chosen, z, weight in zip(logits.detach(), tokens, normalizers, grad, strict=True):
            gradient = (row - z[:, None]).exp_().mul_(-weight[:, None])
            row.copy_(gradient.scatter_add_(-1, chosen[:, None], weight[:, None]))
        return logits, None


def _entropy(logps: Tensor) -> Tensor:
    """In nats, of each row of log-probabilities (t, vocabulary): (t,)."""
    return -(logps.exp().mul_(logps)).sum(-1)
