"""Around TRL's RewardTrainer: what the reward model reads, how good it is, and the scale of its scores."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_recipes import evaluation
from rlhf_recipes.backoff import in_chunks
from rlhf_recipes.data.formats import render
from rlhf_recipes.roles import HEAD_FILE, REWARD, Episodes, Roles

SCALE_PROMPTS = 256
"""Samples that the scale of a reward model is measured on."""


def tokenize(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Pairs as RewardTrainer takes them, each answer rendered as a rollout of PPO will be: prompt, completion, EOS.

    TRL's own rendering puts after a ChatML answer the newline of the template, which no rollout ends in.
    """

    def ids(row: dict[str, Any]) -> dict[str, list[int]]:
        return {f"{key}_ids": list(chain(*render(row, tokenizer, key))) for key in ("chosen", "rejected")}

    return pairs.map(ids, desc="Tokenizing pairs")


@torch.no_grad()
def pair_scores(
    model: PeftModel, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Scores (n,) of the chosen and of the rejected answers of tokenized pairs, under the reward model as trained.

    An answer that stands in several pairs, as those of a ranking do, is scored once.
    """
    model.eval()
    columns = [[tuple(ids) for ids in pairs[key]] for key in ("chosen_ids", "rejected_ids")]
    answers = sorted(set(chain(*columns)), key=len)  # those of like length together

    def score(rows: slice) -> list[float]:
        ids = [list(answer) for answer in answers[rows]]
        batch = Episodes.padded([[]] * len(ids), ids, tokenizer.pad_token_id, model.device)
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].tolist()

    scores = dict(zip(answers, chain(*in_chunks(len(answers), batch_size, score)[0]), strict=True))
    chosen, rejected = (torch.tensor([scores[answer] for answer in column]) for column in columns)
    return chosen, rejected


def longer(pairs: Dataset) -> Tensor:
    """By how many tokens (n,) the chosen answer of each tokenized pair is longer than the rejected one."""
    chosen, rejected = (torch.tensor([len(ids) for ids in pairs[key]]) for key in ("chosen_ids", "rejected_ids"))
    return chosen - rejected


def agreement(
    chosen: Tensor,
    rejected: Tensor,
    prompts: Sequence[Any] | None = None,
    longer: Tensor | None = None,
    bins: int = 10,
) -> dict[str, Any]:
    """How a reward model agrees with its raters, from the scores (n,) of chosen and rejected answers.

    Accuracy counts ties as half; with `prompts` (n), its interval takes the pairs of one prompt together. The
    calibration error is the mean distance, over bins of equal width, between how sure the model is (the sigmoid of its
    margin) and how often it is right; source: Guo et al. (arXiv 1706.04599), equation 3. `reliability` holds the bins.
    With `longer` (n), by how many tokens the chosen answer is longer, `when_shorter` is the accuracy on the pairs whose
    better answer is the shorter one: far below `accuracy`, the model likes length.
    """
    margin = chosen - rejected
    right = (margin > 0).float() + 0.5 * (margin == 0).float()
    sure = torch.sigmoid(margin.abs())
    bin_of = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    reliability = [
        {
            "confidence": sure[bin_of == b].mean().item(),
            "accuracy": right[bin_of == b].mean().item(),
            "pairs": int((bin_of == b).sum()),
        }
        for b in bin_of.unique()
    ]
    error = sum(b["pairs"] / len(margin) * abs(b["accuracy"] - b["confidence"]) for b in reliability)
    prompts = prompts or range(len(right))
    figures: dict[str, Any] = {
        "accuracy": _interval_of_pairs(right, prompts),
        "margin": margin.mean().item(),
        "calibration_error": error,
        "pairs": len(margin),
    }
    if longer is not None and (shorter := longer < 0).any():
        asked = [prompt for prompt, kept in zip(prompts, shorter.tolist(), strict=True) if kept]
        figures["when_shorter"] = _interval_of_pairs(right[shorter], asked)
    return figures | {"reliability": reliability}


def _interval_of_pairs(right: Tensor, prompts: Sequence[Any]) -> evaluation.Interval:
    """Mean of `right` (n,) and half of its 95% interval: a ranking of six responses is not fifteen observations."""
    pairs: dict[str, list[float]] = defaultdict(list)
    for prompt, value in zip(prompts, right.tolist(), strict=True):
        pairs[str(prompt)].append(value)
    return evaluation.rate([sum(of) for of in pairs.values()], [len(of) for of in pairs.values()]).around_mean()


def measure_scale(
    cfg: DictConfig, policy: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, folder: Path
) -> dict[str, float]:
    """Mean and spread of the scores on samples of the SFT policy, written beside the reward model in `folder`.

    PPO reads them with the head and sees rewards of mean 0 and spread 1, so that `beta` means the same whatever reward
    model is used.
    """
    roles = Roles(policy, trunk=0)
    roles.hold(REWARD, [folder])
    prompts = {str(prompt): {"prompt": prompt} for prompt in pairs.shuffle(seed=cfg.seed)[:4096]["prompt"]}
    made = evaluation.sample(
        roles.model,
        tokenizer,
        list(prompts.values())[:SCALE_PROMPTS],
        samples=1,
        max_new_tokens=cfg.evaluation.max_new_tokens,
        batch_size=cfg.evaluation.batch_size,
        seed=cfg.seed,
    )
    scores = torch.tensor(evaluation.rewards(roles, tokenizer, made, cfg.evaluation.batch_size))
    scale = {"mean": scores.mean().item(), "std": max(scores.std().item(), 1e-6)}
    state = PartialState()
    state.wait_for_everyone()  # the others read the folder, which the first is about to move
    if state.is_main_process:
        (folder / HEAD_FILE).write_text(json.dumps(scale))
    return scale
