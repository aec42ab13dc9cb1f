"""The episodes of a rollout batch, and the micro-batches of like length that they are scored and trained in.

A rollout batch is padded to its longest prompt and its longest completion. Episodes differ in length, and every pass
over them would pay for the padding: so they are sorted by length once, and each micro-batch is cut to what its own
longest episode needs, or a little more: widths are multiples, since kernels and allocators keep memory for each shape
that they meet. It is scored and trained with the same padding, so the ratio starts at 1 in bf16, too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_recipes.roles import Episodes

WIDTHS = 16
"""Tokens that the widths of micro-batches are multiples of, where TRL's `pad_to_multiple_of` says nothing."""


@dataclass(frozen=True)
class MicroBatch:
    """Some of `b` episodes: their rows (m,), and the columns of prompts (b, p) and completions (b, t) they need."""

    rows: Tensor
    prompt: slice  # padding is on the left
    completion: slice  # padding is on the right

    def of_prompts(self, x: Tensor) -> Tensor:
        """Their part of a tensor over prompts (b, p)."""
        return x[self.rows, self.prompt]

    def of_completions(self, x: Tensor) -> Tensor:
        """Their part of a tensor over completions (b, t)."""
        return x[self.rows, self.completion]


@dataclass
class Rollout(Episodes):
    """The episodes of a rollout batch, as policy and reference see them."""

    micro_batches: list[MicroBatch] = field(default_factory=list)
    trunk: list[Tensor | None] = field(default_factory=list)  # by micro-batch: output of the shared lower layers
    logps: Tensor = field(default_factory=Tensor)  # (b, t): log-probabilities under the policy that generated them
    ref_logps: Tensor = field(default_factory=Tensor)  # (b, t): the same under the reference
    kl: Tensor = field(default_factory=Tensor)  # (b, t): KL(policy || reference) of each token, over the vocabulary

    @property
    def prompt_length(self) -> int:
        """`p`, the width of the prompts."""
        return self.input_ids.size(1) - self.completion_length

    def sort(self, size: int, multiple: int | None = None) -> None:
        """Settle the micro-batches: `size` episodes each, of like length, cut to a `multiple` of tokens."""
        prompts = self.attention_mask[:, : self.prompt_length].sum(dim=1)
        completions = self.mask.sum(dim=1)
        multiple = multiple or 1
        self.micro_batches = []
        for rows in torch.argsort(prompts + completions, stable=True).split(size):
            longest, needed = (-int(lengths[rows].max()) // multiple * -multiple for lengths in (prompts, completions))
            cut = slice(max(self.prompt_length - longest, 0), None)
            self.micro_batches.append(MicroBatch(rows, cut, slice(0, min(max(needed, 1), self.completion_length))))
        self.trunk = [None] * len(self.micro_batches)

    def inputs(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of a micro-batch, prompts and completions together."""
        parts = (
            x.split([self.prompt_length, self.completion_length], 1) for x in (self.input_ids, self.attention_mask)
        )
        ids, mask = (torch.cat([micro_batch.of_prompts(p), micro_batch.of_completions(t)], 1) for p, t in parts)
        return ids, mask

    def join(self, parts: Iterable[Tensor]) -> Tensor:
        """One tensor (b,) or (b, t), zero where nothing was computed, of what was computed by micro-batch."""
        parts = list(parts)
        shape = (len(self.mask),) if parts[0].ndim == 1 else tuple(self.mask.shape)
        joined = parts[0].new_zeros(shape)
        for micro_batch, part in zip(self.micro_batches, parts, strict=True):
            if part.ndim == 1:
                joined[micro_batch.rows] = part
            else:
                joined[micro_batch.rows, micro_batch.completion] = part
        return joined

    def split(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """TRL's batch as one tensor for each micro-batch: lists, which TRL shuffles and hands out one by one.

        What is no tensor over the episodes (None, a count) stays as it is.
        """

        def cut(name: str, x: Tensor, micro_batch: MicroBatch) -> Tensor:
            if x.ndim == 1:
                return x[micro_batch.rows]
            return micro_batch.of_prompts(x) if name.startswith("prompt") else micro_batch.of_completions(x)

        order = {"micro_batch": torch.arange(len(self.micro_batches))}  # TRL asks the first one for its length
        return order | {
            name: [cut(name, x, micro_batch) for micro_batch in self.micro_batches]
            if isinstance(x, Tensor) and x.ndim
            else x
            for name, x in batch.items()
        }
