"""Completions of held-out prompts: sampled, and computed on, in batches that shrink where memory ends."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.backoff import in_chunks
from rlhf_recipes.data.formats import render_prompt
from rlhf_recipes.portions import prefill_chunk
from rlhf_recipes.roles import Episodes

Row = TypeVar("Row")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """One completion of one held-out prompt."""

    prompt: Any
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]  # EOS included, where there is one
    ended: bool = True  # by a token that ends an answer, and not by the limit


@torch.no_grad()
def sample(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Mapping[str, Any]],
    *,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Sample]:
    """Sample from a model, with the adapter that is active, at temperature 1: `samples` completions a prompt in a row.

    The random state outside is left alone, and equal seeds give equal noise to different policies.
    """
    model.eval()
    declared = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    rows = [(row["prompt"], render_prompt(dict(row), tokenizer)) for row in prompts for _ in range(samples)]

    def complete(batch: Sequence[tuple[Any, list[int]]]) -> list[Sample]:
        padded = Episodes.padded([ids for _, ids in batch], [[]] * len(batch), tokenizer.pad_token_id, model.device)
        sequences = model.generate(
            input_ids=padded.input_ids,
            attention_mask=padded.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=sorted(eos),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            prefill_chunk_size=prefill_chunk(len(batch), padded.input_ids.size(1), model.device.type),
        )
        made = []
        for (prompt, prompt_ids), tokens in zip(batch, sequences[:, padded.input_ids.size(1) :].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            made.append(Sample(prompt, text, prompt_ids, tokens[:end], tokens[end - 1] in eos))
        return made

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return by_batches(rows, batch_size, complete)


def by_batches(rows: Sequence[Row], size: int, compute: Callable[[Sequence[Row]], list[Result]]) -> list[Result]:
    """`compute` on batches of at most `size` rows, its results in one list."""
    parts, _ = in_chunks(len(rows), size, lambda part: compute(rows[part]))
    return list(chain.from_iterable(parts))
