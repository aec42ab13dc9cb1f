"""Completions under the rewards of a config: the score by each source, and their weighted sum, as PPO has it."""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.evaluation.measures import classifier_scores, rewards
from rlhf_recipes.evaluation.sampling import Sample, as_seen_by
from rlhf_recipes.rewards import Rewards, called
from rlhf_recipes.roles import REWARD, Roles

logger = logging.getLogger(__name__)

Scores = Sequence[float | None]


def by_source(
    sources: Rewards,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    made: Sequence[Sample],
    batch_size: int,
    role: str = REWARD,
) -> dict[str, Scores]:
    """The score of each sample by each source, by its name; None where it gives none that is finite.

    Args:
        role: that of the sources' adapters, which `roles` holds.
    """
    columns: list[Scores] = [rewards(roles, tokenizer, made, batch_size, role)] if sources.adapters else []
    columns += [scored(by, made, batch_size) for by in sources.functions]
    return {name: _finite(name, column) for name, column in zip(sources.names, columns, strict=True)}


def _finite(name: str, column: Scores) -> Scores:
    known = [score if score is not None and math.isfinite(score) else None for score in column]
    if bad := known.count(None) - list(column).count(None):
        logger.warning("%s: %s scores are NaN or infinite, and left out", name, bad)
    return known


def scored(by: Any, made: Sequence[Sample], batch_size: int) -> Scores:
    """The score of each sample by a function of TRL's signature or by a sequence classifier, in its own tokens."""
    if not isinstance(by, PreTrainedModel):
        return called(by, made)
    tokenizer = AutoTokenizer.from_pretrained(by.config.name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    by.config.pad_token_id = tokenizer.pad_token_id  # by which it finds the token that it scores
    return classifier_scores(by, tokenizer, [as_seen_by(tokenizer, sample) for sample in made], batch_size)


def total(columns: Iterable[Scores], weights: Sequence[float]) -> list[float | None]:
    """The weighted sum of the scores that each sample has, as in TRL; None where it has none."""
    found = []
    for row in zip(*columns, strict=True):
        known = [weight * score for score, weight in zip(row, weights, strict=True) if score is not None]
        found.append(sum(known) if known else None)
    return found
