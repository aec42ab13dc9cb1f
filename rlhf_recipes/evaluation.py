"""What a stage changed: completions of several policies on the same held-out prompts, measured side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeVar

import torch
from datasets import Dataset
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase

from rlhf_recipes import data, world
from rlhf_recipes.backoff import in_chunks
from rlhf_recipes.data.formats import render_prompt
from rlhf_recipes.ppo.advantages import kl_estimate
from rlhf_recipes.roles import POLICY, REFERENCE, REWARD, Episodes, Roles

Row = TypeVar("Row")
Result = TypeVar("Result")

GOLD = ("helpful", "honest", "harmless")
"""What a known truth says of a completion; each prompt asks for one of them."""


class Interval(NamedTuple):
    """A mean, and half of its 95% interval."""

    mean: float
    half_width: float


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
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Mapping[str, Any]],
    *,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[Sample]:
    """Sample from the active adapter at temperature 1, `samples` completions a prompt, prompt by prompt.

    The random state outside is left alone, and equal seeds give equal noise to different policies.
    """
    model = roles.model
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
        )
        made = []
        for (prompt, prompt_ids), tokens in zip(batch, sequences[:, padded.input_ids.size(1) :].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
            made.append(Sample(prompt, text, prompt_ids, tokens[:end], tokens[end - 1] in eos))
        return made

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _by_batches(rows, batch_size, complete)


@torch.no_grad()
def rewards(roles: Roles, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample], batch_size: int) -> list[float]:
    """The reward adapter's score of each sample."""

    def score(batch: Sequence[Sample]) -> list[float]:
        episodes = _episodes(roles, tokenizer, batch)
        return roles.scores(episodes.input_ids, episodes.attention_mask, tokenizer.pad_token_id).tolist()

    with roles.active(REWARD):
        return _by_batches(made, batch_size, score)


@torch.no_grad()
def kl(
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    made: Sequence[Sample],
    batch_size: int,
    *,
    policy: str | None,
    reference: str | None,
) -> list[float]:
    """KL(policy || reference) of each sample of `policy`, in nats per completion; the adapters are given by name."""

    def divergences(batch: Sequence[Sample]) -> list[float]:
        episodes = _episodes(roles, tokenizer, batch)
        logps = []
        for adapter in (policy, reference):
            with roles.active(adapter):
                scored = roles.token_logps(episodes.input_ids, episodes.attention_mask, episodes.completion_length)
                logps.append(scored[0].float())
        return (kl_estimate(logps[0], logps[1], "k3") * episodes.mask).sum(dim=1).tolist()

    return _by_batches(made, batch_size, divergences)


def _episodes(roles: Roles, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample]) -> Episodes:
    ids, completions = [s.prompt_ids for s in made], [s.completion_ids for s in made]
    return Episodes.padded(ids, completions, tokenizer.pad_token_id, roles.model.device)


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


@dataclass(frozen=True)
class Changes:
    """Policies side by side on the same held-out prompts."""

    figures: dict[str, dict[str, Interval]]  # by policy, then by measure; `change` is the last policy less the first
    samples: list[dict[str, str]]  # a prompt and, by policy, the first completion of it


def changes(
    cfg: DictConfig,
    asked: Dataset | None,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    policies: Mapping[str, str | None],
) -> Changes:
    """What several policies answer to the same held-out prompts with the same noise, and how good that is.

    Args:
        asked: what `data.heldout_prompts` gives; None where the data have no prompts, and the result is empty.
        policies: the adapter of each policy, by the name to show; None is the bare base. The KL is taken to the
            reference where there is one, and else to the policy.
    """
    if asked is None:
        return Changes({}, [])
    options = cfg.evaluation
    gold = world.gold if all(source.kind == "world" for source in data.parse(cfg.data, "prompts")[0]) else None
    reference = REFERENCE if REFERENCE in roles.model.peft_config else POLICY
    values: dict[str, dict[str, Sequence[float | None]]] = {}
    samples = [{"prompt": _last_words(row["prompt"])} for row in asked]
    for name, adapter in policies.items():
        with roles.active(adapter):
            made = sample(
                roles,
                tokenizer,
                asked,
                samples=options.samples,
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                seed=cfg.seed,
            )
        measured = values[name] = {
            "KL to SFT": kl(roles, tokenizer, made, options.batch_size, policy=adapter, reference=reference),
            "length": [float(len(s.completion_ids)) for s in made],
            "EOS": [float(s.ended) for s in made],
        }
        if REWARD in roles.heads:
            measured["reward"] = rewards(roles, tokenizer, made, options.batch_size)
        if gold is not None:
            verdicts = [gold(s.prompt, s.completion) for s in made]
            measured |= {name: [getattr(v, name) for v in verdicts] for name in GOLD}
        for row, s in zip(samples, made[:: options.samples], strict=True):
            row[name] = s.completion
    # prompt by prompt, so that what is hard for both policies does not widen the interval
    if len(values) > 1:
        first, *_, last = values.values()
        values["change"] = {name: _differences(first[name], last[name]) for name in last}
    return Changes({name: summarize(measured, options.samples) for name, measured in values.items()}, samples)


def _differences(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else b - a for a, b in zip(before, after, strict=True)]


def _last_words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _by_batches(rows: Sequence[Row], size: int, compute: Callable[[Sequence[Row]], list[Result]]) -> list[Result]:
    """`compute` on batches of at most `size` rows, its results in one list."""
    parts, _ = in_chunks(len(rows), size, lambda part: compute(rows[part]))
    return list(chain.from_iterable(parts))
