"""Out of memory: what does not fit is computed in parts, and everything that is learned comes out the same.

No test has a GPU that is too small; instead, layers refuse batches of more rows than they are said to hold.
"""

import itertools
import logging

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf_recipes import PPOConfig, PPOTrainer
from rlhf_recipes.backoff import BackOff, back_off, in_chunks
from rlhf_recipes.errors import UserError
from rlhf_recipes.models import thaw

COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 6,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


class Card:
    """Stands for a GPU that holds a forward, or a backward, of so many rows at once."""

    def __init__(self, model, rows, when="forward", error=None):
        self.rows, self.failures = rows, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        layer = model.get_base_model().base_model.layers[-1]
        layer.register_forward_hook(self.forward if when == "forward" else self.backward)

    def check(self, tensor):
        if len(tensor) > self.rows:
            self.failures += 1
            raise self.error

    def forward(self, module, args, output):
        if output.requires_grad:
            self.check(output)

    def backward(self, module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: self.check(gradient))


@pytest.fixture
def sft(tiny_policy, tokenizer, tmp_path):
    def make(**options):
        rows = [{"prompt": "w1 " * (i % 3 + 1), "completion": "w2 " * (i % 5 + 1)} for i in range(24)]
        args = SFTConfig(str(tmp_path), **COMMON | options)
        return SFTTrainer(tiny_policy(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return make


@pytest.fixture
def dpo(tiny_policy, tokenizer, tmp_path):
    def make(**options):
        rows = [{"prompt": "w1", "chosen": " w2" * (i % 4 + 1), "rejected": " w3" * (i % 3 + 1)} for i in range(24)]
        args = DPOConfig(str(tmp_path), **COMMON | options)
        return DPOTrainer(tiny_policy(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return make


@pytest.fixture
def rm(tiny_llama, tokenizer, tmp_path):
    def make(**options):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForSequenceClassification

        config = tiny_llama().config
        config.num_labels = 1
        torch.manual_seed(0)
        model = get_peft_model(
            LlamaForSequenceClassification(config),
            LoraConfig(
                r=4,
                target_modules="all-linear",
                task_type="SEQ_CLS",
                modules_to_save=["score"],
                init_lora_weights=False,
            ),
        )
        rows = [
            {
                "chosen_ids": [3 + i, *range(5, 7 + i % 4)],
                "rejected_ids": [4 + i, *range(9, 11 + i % 3)],
                "margin": i / 24,
            }
            for i in range(24)
        ]
        args = RewardConfig(str(tmp_path), center_rewards_coefficient=0.1, **COMMON | options)
        return RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)

    return make


@pytest.fixture
def ppo(tiny_policy, tokenizer, prompts, tmp_path):
    def make(**options):
        args = PPOConfig(
            str(tmp_path),
            max_completion_length=6,
            steps_per_generation=(COMMON | options)["gradient_accumulation_steps"],
            value_pretraining_passes=0,
            **COMMON | {"ptx_coef": 0.1} | options,
        )
        rows = Dataset.from_list([{"prompt": f"w{i}", "completion": "w7 " * (i % 3 + 1)} for i in range(9)])
        return PPOTrainer(
            tiny_policy(),
            lambda completions, **kwargs: [float(c.count("w3")) for c in completions],
            args,
            train_dataset=prompts,
            processing_class=tokenizer,
            ptx_dataset=rows,
        )

    return make


STAGES = ("sft", "rm", "dpo", "ppo")


def learned(trainer, pairs=False, card=None, when="forward"):
    """The trained weights after two steps, and the parts that micro-batches ended in."""
    if not isinstance(trainer, PPOTrainer):
        thaw(trainer.model, trunk=0)
    watch = BackOff(trainer, pairs=pairs)
    watch.card = Card(trainer.model, card, when) if card else None
    trainer.train()
    weights = [p.detach().clone() for group in trainer.optimizer.param_groups for p in group["params"]]
    return torch.cat([w.flatten() for w in weights]), watch


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_in_parts_teaches_what_the_whole_batch_does(stage, when, request, caplog):
    make, pairs = request.getfixturevalue(stage), stage in ("rm", "dpo")
    whole, _ = learned(make(), pairs)
    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        parts, watch = learned(make(), pairs, card=4, when=when)
    assert watch.parts == (4 if pairs else 2)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert "out of GPU memory at step 0 (CUDA out of memory)" in caplog.text


def test_a_batch_goes_in_parts_whichever_way_cuda_says_that_memory_is_full(sft):
    trainer = sft(max_steps=1)
    thaw(trainer.model, trunk=0)
    watch = BackOff(trainer)
    Card(trainer.model, 4, error=torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be", 2))
    trainer.train()
    assert watch.parts == 2


class Copied(TorchDispatchMode):
    """Counts the bytes of copies."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.bytes += made.nbytes
        return made


def test_where_memory_suffices_nothing_is_copied_and_gradients_stay_where_they_are(sft):
    trainer = sft()
    thaw(trainer.model, trunk=0)
    trainer.create_optimizer()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    watch = BackOff(trainer)
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    watch._step = lambda *_: [setattr(p, "grad", torch.ones_like(p)) for p in parameters]
    watch.training_step(trainer.model, inputs)
    kept = [p.grad for p in parameters]
    with Copied() as copied:
        watch.training_step(trainer.model, inputs)
    assert copied.bytes == 0 and parameters
    assert all(p.grad is gradient and (gradient == 2).all() for p, gradient in zip(parameters, kept, strict=True))


def test_an_entropy_bonus_counts_the_same_in_parts(ppo):
    options = {"entropy_coef": 0.5, "optim": "sgd", "learning_rate": 0.1, "max_steps": 1}
    whole, _ = learned(ppo(**options))
    parts, watch = learned(ppo(**options), card=4)
    assert watch.parts == 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_after_a_failed_one_starts_from_the_gradients_before_it(stage, request):
    """The second of two micro-batches fails: what the first had accumulated is there again, and counted once."""
    make, pairs = request.getfixturevalue(stage), stage in ("rm", "dpo")
    whole, _ = learned(make(), pairs)
    trainer = make()
    if stage != "ppo":
        thaw(trainer.model, trunk=0)
    watch = BackOff(trainer, pairs=pairs)
    card = Card(trainer.model, 1000, "backward")
    steps, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        steps.append(None)
        card.rows = 4 if len(steps) == 2 else 1000
        return step(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert card.failures and watch.parts > 1
    weights = torch.cat([p.detach().flatten() for g in trainer.optimizer.param_groups for p in g["params"]])
    torch.testing.assert_close(weights, whole, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_a_mean_over_tokens_is_shared_by_tokens(sft):
    """Where a model takes no count of the tokens to train on, TRL averages over the micro-batch."""

    def make():
        trainer = sft()
        trainer.model_accepts_loss_kwargs = False
        return trainer

    whole, _ = learned(make())
    parts, watch = learned(make(), card=4)
    assert watch.parts == 2
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_one_sequence_that_does_not_fit_ends_with_what_to_set(stage, request):
    make, pairs = request.getfixturevalue(stage), stage in ("rm", "dpo")
    with pytest.raises(UserError, match=r"with one sequence at a time .*trunk.*quantization=nf4"):
        learned(make(), pairs, card=0.5)


def test_without_a_gpu_nothing_is_watched(sft):
    trainer = sft()
    back_off(trainer)
    assert "training_step" not in vars(trainer)


def test_chunks_are_halved_until_they_fit_and_no_row_is_lost(caplog):
    tried = []

    def compute(rows):
        tried.append(rows)
        if rows.stop - rows.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
        return list(range(10))[rows]

    with caplog.at_level(logging.WARNING, "rlhf_recipes"):
        parts, size = in_chunks(10, 16, compute)
    assert [*itertools.chain(*parts)] == list(range(10))
    assert size == 2
    assert [r.stop - r.start for r in tried] == [16, 5, 2, 2, 2, 2, 2]
    assert "going on with 2 sequences at once" in caplog.text


def test_a_chunk_of_one_that_does_not_fit_is_told():
    def compute(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")

    with pytest.raises(UserError, match=r"with one sequence at a time \(CUDA out of memory\)"):
        in_chunks(3, 2, compute)


def test_a_rollout_that_does_not_fit_is_generated_and_scored_in_smaller_chunks(ppo):
    trainer = ppo(ptx_coef=0)
    layer = trainer.model.get_base_model().base_model.layers[-1]

    def small(module, args, output):
        if not torch.is_grad_enabled() and len(output) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")

    layer.register_forward_hook(small)
    trainer.train()
    assert trainer.state.global_step == 2
    assert (trainer._rollout_batch_size, trainer._score_batch_size) == (3, 3)
