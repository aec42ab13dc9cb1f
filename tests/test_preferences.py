"""Pairs in TRL's trainers: which of their tokens are compared, and how much each pair counts."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification
from trl import DPOConfig, RewardConfig

from rlhf_recipes import data, reward_model
from rlhf_recipes.preferences import PairDPOTrainer, PairRewardTrainer

ROWS = [
    {"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w7", "weight": 1.5},
    {"prompt": "w5", "chosen": " w6", "rejected": " w8 w9 w3", "weight": 0.5},
]
COMMON = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "per_device_train_batch_size": 2}


@pytest.fixture
def make_trainer(tiny_llama, tokenizer, tmp_path):
    """A function that makes the trainer of a recipe on rows of pairs, with an adapter that is not zero."""

    def make(recipe, rows, **options):
        lora = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
        base, rows = tiny_llama(), Dataset.from_list(rows)
        if recipe == "dpo":
            model = get_peft_model(base, LoraConfig(**lora, task_type="CAUSAL_LM"))
            args, rows = DPOConfig(str(tmp_path), **COMMON, **options), data.comparisons(rows, tokenizer)
            trainer = PairDPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
            for name, parameter in model.named_parameters():  # else all pairs stand at log 2 and pull alike
                parameter.data += 0.1 * torch.randn_like(parameter) if ".lora_B.default." in name else 0
            return trainer
        torch.manual_seed(3)
        base.config.num_labels = 1
        model = LlamaForSequenceClassification(base.config)
        model = get_peft_model(model, LoraConfig(**lora, task_type="SEQ_CLS", modules_to_save=["score"]))
        args, rows = RewardConfig(str(tmp_path), **COMMON, **options), reward_model.tokenize(rows, tokenizer)
        return PairRewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer)

    return make


def gradient(trainer, examples):
    """The gradient of the loss on a batch of examples, as one vector."""
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, trainer.data_collator(examples)).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_the_reference_is_the_policy_at_the_start_whatever_the_adapter_sits_on(
    tiny_llama, tokenizer, tmp_path, adapter, precompute
):
    base = tiny_llama()
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **adapter))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    args = DPOConfig(str(tmp_path), **COMMON, precompute_ref_log_probs=precompute)
    rows = data.comparisons(Dataset.from_list(ROWS), tokenizer)
    trainer = PairDPOTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    loss = trainer.compute_loss(model.train(), trainer.data_collator(list(trainer.train_dataset)))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("recipe", ["rm", "dpo"])
def test_a_pair_counts_in_the_gradient_by_its_weight(make_trainer, recipe):
    trainer = make_trainer(recipe, ROWS, **({"center_rewards_coefficient": 0.1} if recipe == "rm" else {}))
    examples = list(trainer.train_dataset)
    alone = [gradient(trainer, [{k: v for k, v in row.items() if k != "weight"}]) for row in examples]
    assert not torch.allclose(alone[0], alone[1], rtol=0.1)
    torch.testing.assert_close(gradient(trainer, examples), (1.5 * alone[0] + 0.5 * alone[1]) / 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("recipe", "options"), [("rm", {}), ("dpo", {}), ("dpo", {"precompute_ref_log_probs": True})])
def test_weighed_pairs_train_from_their_rows_to_their_end(make_trainer, recipe, options):
    trainer = make_trainer(recipe, ROWS * 2, max_steps=2, save_strategy="no", **options)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_of_answers_of_one_turn_a_batch_is_trls_own(make_trainer, tokenizer):
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [{k: v for k, v in row.items() if k != "weight"} for row in ROWS]
    ours = make_trainer("dpo", rows)
    trls = DPOTrainer._prepare_dataset(ours, Dataset.from_list(rows), tokenizer, ours.args, "train")
    batch, wanted = ours.data_collator(list(ours.train_dataset)), DataCollatorForPreference(0)(list(trls))
    assert batch.keys() == wanted.keys() and all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_in_an_answer_of_several_turns_the_assistants_are_compared_alone(make_trainer, tokenizer):
    user, assistant = {"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}
    template = "{% for m in messages %}{{ m.content + ' ' }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    tokenizer.chat_template = template
    try:
        rows = [{"prompt": [user], "chosen": [assistant, user, assistant], "rejected": [assistant]}]
        trainer = make_trainer("dpo", rows)
    finally:
        tokenizer.chat_template = None
    batch = trainer.data_collator(list(trainer.train_dataset))
    #                                             w3 w4 eos w3 w4 eos
    assert batch["input_ids"].tolist() == [[6, 7, 1, 6, 7, 1], [6, 7, 1, 0, 0, 0]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0]]
