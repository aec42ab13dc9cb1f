"""What is measured of completions: the reward model's scores, and the divergence from another policy."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.evaluation.sampling import Sample, by_batches
from rlhf_recipes.portions import rows_at_once
from rlhf_recipes.roles import REWARD, Episodes, Roles


@torch.no_grad()
def rewards(
    roles: Roles, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample], batch_size: int, role: str = REWARD
) -> list[float]:
    """The score of each sample by a reward role, or by its ensemble."""

    def score(batch: Sequence[Sample]) -> list[float]:
        episodes = _episodes(roles, tokenizer, batch)
        scores = []
        for member in roles.members(role):
            with roles.active(member):
                scored = roles.scores(episodes.input_ids, episodes.attention_mask, tokenizer.pad_token_id, member)
                scores.append(scored)
        return roles.combine(role, torch.stack(scores)).tolist()

    return by_batches(made, rows_at_once(batch_size, _longest(made), roles.model.device.type), score)


@torch.no_grad()
def classifier_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample], batch_size: int
) -> list[float]:
    """The score of each sample, in this tokenizer's ids, by a sequence classifier of one label."""

    def score(batch: Sequence[Sample]) -> list[float]:
        whole = [[*s.prompt_ids, *s.completion_ids] for s in batch]
        padded = Episodes.padded([[]] * len(whole), whole, tokenizer.pad_token_id, model.device)
        logits = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        return logits[:, 0].float().tolist()

    return by_batches(made, rows_at_once(batch_size, _longest(made), model.device.type), score)


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
    """KL(policy || reference) of each sample of `policy`, in nats per completion: over the vocabulary, token by token.

    The adapters are given by name; None is the bare base.
    """

    def divergences(batch: Sequence[Sample]) -> list[float]:
        episodes = _episodes(roles, tokenizer, batch)
        with roles.decoder_outputs() as outputs:
            for adapter in (policy, reference):
                with roles.active(adapter):
                    roles.hidden_states(episodes.input_ids, episodes.attention_mask)
        return roles.exact_kl((policy, reference), outputs, episodes.mask).sum(dim=1).tolist()

    return by_batches(made, rows_at_once(batch_size, _longest(made), roles.model.device.type), divergences)


def _longest(made: Sequence[Sample]) -> int:
    return max((len(s.prompt_ids) + len(s.completion_ids) for s in made), default=1)


def _episodes(roles: Roles, tokenizer: PreTrainedTokenizerBase, made: Sequence[Sample]) -> Episodes:
    ids, completions = [s.prompt_ids for s in made], [s.completion_ids for s in made]
    return Episodes.padded(ids, completions, tokenizer.pad_token_id, roles.model.device)
