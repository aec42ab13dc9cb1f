"""The self-test before the first rollout: it finds each fault that would go wrong in silence, and changes nothing."""

# ruff: noqa: F811 (fixtures of another module)
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_ppo import count_w3, history, make_trainer, moved, reward_adapter, weights  # noqa: F401
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_recipes.errors import UserError
from rlhf_recipes.ppo.self_test import self_test
from rlhf_recipes.roles import POLICY, REWARD, VALUE

PROMPTS = ["w5 w6 w7", "w8", "w9 w3 w4 w5 w6", "w7 w7"]


def test_where_all_is_well_it_says_so_in_one_line_and_leaves_all_as_it_was(make_trainer, reward_adapter, caplog):
    trainer = make_trainer(reward_adapter=reward_adapter)
    caplog.clear()
    caplog.set_level(logging.INFO, logger="rlhf_recipes")
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = weights(trainer, POLICY, VALUE, REWARD), torch.get_rng_state(), trainer.model.training
    figures = self_test(trainer, PROMPTS)
    assert figures["ratio"] == figures["kl"] == figures["trunk"] == figures["base"] == 0
    assert figures["sampler"] < 1e-5 and figures["reward"] < 1e-5 and figures["seconds"] > 0
    assert ["all well" in record.message for record in caplog.records] == [True]
    assert not moved(before[0], weights(trainer, POLICY, VALUE, REWARD))
    assert torch.equal(torch.get_rng_state(), before[1]) and trainer.model.training == before[2]
    assert "alone" not in trainer.model.peft_config and trainer.model.active_adapter == POLICY
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trainable


def test_a_run_with_it_equals_one_without_bit_for_bit(make_trainer, tiny_policy, reward_adapter):
    runs = []
    for tested in (True, False):
        trainer = make_trainer(tiny_policy(), reward_adapter=reward_adapter, max_steps=2)
        trainer.self_test = None if tested else {}
        trainer.train()
        runs.append((weights(trainer, POLICY, VALUE), history(trainer, "reward")))
    assert not moved(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


def scale_the_reward(trainer):
    trainer.roles.layers[3].mlp.up_proj.scaling[REWARD] *= 4


def change_the_base(trainer):
    trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data.add_(1e-3)


def penalize_repetition_unasked(trainer):
    trainer.generation_config.repetition_penalty = 3.0


def switch_dropout_on(trainer):
    for layer in trainer.roles.layers:
        layer.self_attn.attention_dropout = 0.5


def break_the_reward(trainer):
    trainer.roles.heads[REWARD].weight.data[:] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scale_the_reward, "scores on the shared base differ from those of the reward adapter under plain PEFT by"),
        (change_the_base, "of the base's tensors changed when the roles were added"),
        (
            penalize_repetition_unasked,
            "log-probabilities of the sampler differ from the scored ones by .* nats a token",
        ),
        (switch_dropout_on, "the training pass and the scoring pass differ: their ratio is off 1 by"),
        (break_the_reward, "plain PEFT by inf"),
    ],
)
def test_what_makes_ppo_learn_from_wrong_numbers_is_refused(make_trainer, reward_adapter, spoil, message):
    trainer = make_trainer(reward_adapter=reward_adapter)
    spoil(trainer)
    with pytest.raises(UserError, match=message):
        self_test(trainer, PROMPTS)


def test_a_run_ends_before_its_first_rollout(make_trainer):
    trainer = make_trainer()
    penalize_repetition_unasked(trainer)
    with pytest.raises(UserError, match=r"self-test before the first rollout: .*Nothing was trained"):
        trainer.train()
    assert not history(trainer, "reward")


def test_positions_counted_wrong_are_found(make_trainer):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=43, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2))
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    trainer = make_trainer(get_peft_model(base, lora))
    assert self_test(trainer, PROMPTS)["sampler"] < 1e-5
    trainer.roles.decoder._forward_pre_hooks.clear()
    with pytest.raises(UserError, match="log-probabilities of the sampler differ"):
        self_test(trainer, PROMPTS)


def test_a_policy_changed_by_hand_and_a_cut_that_was_asked_for_are_warned_of(make_trainer, caplog):
    trainer = make_trainer(top_k=3)
    trainer.roles.trained[POLICY][0].data.add_(0.3)
    figures = self_test(trainer, PROMPTS)
    assert figures["kl"] > 0.01 and figures["sampler"] > 0.01
    assert "though it has taken no step" in caplog.text and "differ from the scored ones" in caplog.text


def test_after_a_resume_the_kl_is_left_out_and_the_rest_tried(make_trainer, tiny_policy, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    begun = make_trainer(tiny_policy(), **settings)
    begun.train()
    resumed = make_trainer(tiny_policy(), **settings)
    caplog.set_level(logging.INFO, logger="rlhf_recipes")
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.self_test["kl"] is None and resumed.self_test["ratio"] == 0
    assert resumed.self_test_at_start == begun.self_test != resumed.self_test  # and metrics tell that of the start
    assert "left out: the KL (the policy has moved: the run was resumed)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_no_fault(make_trainer, tiny_policy, caplog, dtype):
    trainer = make_trainer(tiny_policy().to(dtype), bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    figures = self_test(trainer, PROMPTS)
    assert figures["ratio"] == figures["kl"] == 0 and figures["sampler"] < 0.1
    assert not [r for r in caplog.records if r.levelname == "WARNING" and "self-test" in r.message]
