"""TRL's reward and DPO trainers for pairs that are tokenized already, and that count by their weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer import dpo_trainer, reward_trainer
from trl.trainer.utils import pad

from rlhf_recipes.roles import POLICY, Roles, check_adapter, disable_dropout

Batch = dict[str, Any]


class PairRewardTrainer(RewardTrainer):
    """TRL's RewardTrainer; each pair counts in the gradient by its `weight`, where the rows have one."""

    def __init__(self, model: Any, args: RewardConfig, *, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        args.remove_unused_columns = False  # the Trainer would take the weights for unused
        collator = _RewardCollator(processing_class.pad_token_id, args.pad_to_multiple_of)
        super().__init__(model, args, collator, processing_class=processing_class, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        with _weighed(model, inputs) as batch:
            return super().compute_loss(model, batch, *args, **kwargs)


class PairDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer on the rows of `data.comparisons`: in an answer of several turns, the assistant's are compared.

    Each pair counts in the gradient by its `weight`, where the rows have one. (The losses that sort a batch, `aot` and
    `aot_unpaired`, know no pairs: there a weight falls on rows.)
    """

    def __init__(self, model: Any, args: DPOConfig, *, processing_class: PreTrainedTokenizerBase, **kwargs: Any):
        args.remove_unused_columns = False
        collator = _DPOCollator(processing_class.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        if isinstance(model, PeftModel):
            check_adapter(model.peft_config.get(POLICY))
            if args.disable_dropout:
                disable_dropout(model)
            # TRL's copy of the policy, its reference, leaves out what an adapter has on the embeddings
            model.add_adapter = lambda name, _: Roles(model, trunk=0).add_copy(name, POLICY)
        super().__init__(model, args=args, data_collator=collator, processing_class=processing_class, **kwargs)
        self.model.__dict__.pop("add_adapter", None)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset  # TRL's own would tokenize again, user turns and what follows EOS included

    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> Any:
        with _weighed(model, inputs) as batch:
            return super().compute_ref_log_probs(model, batch)

    def compute_loss(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        with _weighed(model, inputs) as batch:
            return super().compute_loss(model, batch, *args, **kwargs)


@contextmanager
def _weighed(model: nn.Module, inputs: Batch) -> Iterator[Batch]:
    """The batch without its `weight` (b,), by which the gradients of what the model gives for each pair are scaled.

    That is the gradient of the weighted loss, for every loss that is a mean over pairs, with TRL's formula untouched.
    """
    batch = {name: value for name, value in inputs.items() if name != "weight"}
    if len(batch) == len(inputs):
        yield batch
        return
    weights = inputs["weight"].repeat(2)  # (2 b,): a batch holds all chosen answers and then all rejected ones

    def scale(module: nn.Module, args: Any, output: Any) -> None:
        scores = output.log_probs if "log_probs" in output else output.logits  # (2 b, s) in DPO, (2 b, 1)
        if scores.requires_grad:
            scores.register_hook(lambda gradient: gradient * weights[:, None])

    hook = model.register_forward_hook(scale)
    try:
        yield batch
    finally:
        hook.remove()


def _with_weights(batch: Batch, examples: list[Batch]) -> Batch:
    if "weight" in examples[0]:
        batch["weight"] = torch.tensor([example["weight"] for example in examples])
    return batch


class _RewardCollator(reward_trainer.DataCollatorForPreference):
    def torch_call(self, examples: list[Batch]) -> Batch:
        return _with_weights(super().torch_call(examples), examples)


class _DPOCollator(dpo_trainer.DataCollatorForPreference):
    def torch_call(self, examples: list[Batch]) -> Batch:
        batch = super().torch_call(examples)
        masks = [torch.tensor(example[f"{side}_mask"]) for side in ("chosen", "rejected") for example in examples]
        batch["completion_mask"] = pad(masks, 0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
        return _with_weights(batch, examples)
