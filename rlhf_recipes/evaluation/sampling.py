"""Completions of held-out prompts: sampled, and computed on, in batches that shrink where memory ends."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_recipes.backoff import in_chunks
from rlhf_recipes.data.formats import is_conversational, render, render_prompt
from rlhf_recipes.errors import UserError, first_sentence
from rlhf_recipes.finite import non_finite, some
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
    columns: dict[str, Any] = field(default_factory=dict)  # what else the prompt's row holds


def as_seen_by(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Sample:
    """A sample in the tokens of another model than made it, rendered as that one's own would be."""
    chat = is_conversational(sample.prompt)
    completion = [{"role": "assistant", "content": sample.completion}] if chat else sample.completion
    prompt_ids, ids = render({"prompt": sample.prompt, "completion": completion}, tokenizer)
    return replace(sample, prompt_ids=prompt_ids, completion_ids=ids if sample.ended else ids[:-1] or ids)


class RowNoise(LogitsProcessor):
    """Adds Gumbel noise, so that a row's largest score is a sample of its softmax, from a generator for each row.

    A row draws the same noise whatever else is in its batch. Source: the Gumbel-max trick (arXiv 1411.0030).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        try:
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        except (NotImplementedError, RuntimeError):  # a device without generators of its own
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (b, vocabulary) with noise."""
        rows = [scores.new_empty(scores.size(1), device=g.device).exponential_(generator=g) for g in self.generators]
        return scores - torch.stack(rows).to(scores.device).log_()


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

    Nothing of the model's own generation config is obeyed but the tokens that end an answer: a repetition penalty or
    `min_p` there would draw from another distribution than the policy's. The random state outside is left alone. Equal
    seeds give equal noise to the same completion of the same prompt in every policy, whatever the batch size.
    """
    model.eval()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    declared = base.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    rows = [
        (row, render_prompt(dict(row), tokenizer), _seed(seed, number, again))
        for number, row in enumerate(prompts)
        for again in range(samples)
    ]

    def complete(batch: Sequence[tuple[Mapping[str, Any], list[int], int]]) -> list[Sample]:
        ids = [prompt_ids for _, prompt_ids, _ in batch]
        padded = Episodes.padded(ids, [[]] * len(batch), tokenizer.pad_token_id, base.device)
        width = padded.input_ids.size(1)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,  # the noise is in the scores
            eos_token_id=sorted(eos),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            prefill_chunk_size=prefill_chunk(len(batch), width, base.device.type),
        )
        noise = RowNoise([row_seed for *_, row_seed in batch], base.device)
        with generating_by(base, config):
            sequences = base.generate(
                input_ids=padded.input_ids,
                attention_mask=padded.attention_mask,
                logits_processor=LogitsProcessorList([noise]),
            )
        made = []
        for (row, prompt_ids, _), tokens in zip(batch, sequences[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            columns = {name: value for name, value in row.items() if name != "prompt"}
            made.append(Sample(row["prompt"], text, prompt_ids, tokens[:end], tokens[end - 1] in eos, columns))
        return made

    return by_batches(rows, batch_size, complete)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put a config in the place of the model's own: `generate` fills what it is not given from that one.

    Raises:
        UserError: the model's probabilities are NaN or infinite.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        bad = non_finite(model.named_parameters())
        why = f"its weights hold NaN or infinity: {some(bad)}" if bad else first_sentence(error)
        raise UserError(
            f"cannot sample from the model: its probabilities are NaN or infinite ({why}). "
            "Download the base again, or make the stage again that gave its adapter"
        ) from error
    finally:
        model.generation_config = own


def by_batches(rows: Sequence[Row], size: int, compute: Callable[[Sequence[Row]], list[Result]]) -> list[Result]:
    """`compute` on batches of at most `size` rows, its results in one list."""
    parts, _ = in_chunks(len(rows), size, lambda part: compute(rows[part]))
    return list(chain.from_iterable(parts))
