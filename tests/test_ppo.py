"""PPOTrainer on a tiny Llama: the claims that a run stands on, most of which would break without an error."""

import copy
import os
import re
import socket
import subprocess
import sys
import textwrap
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from gradient_scaler import scale_gradients
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import selective_log_softmax

from rlhf_recipes import PPOConfig, PPOTrainer, portions
from rlhf_recipes.config import build, compose
from rlhf_recipes.errors import UserError
from rlhf_recipes.roles import KL_LOGITS, POLICY, REFERENCE, REWARD, VALUE


def count_w3(completions, **kwargs):
    return [float(completion.split().count("w3")) for completion in completions]


@pytest.fixture
def make_trainer(tmp_path, tiny_policy, tokenizer, prompts):
    """A function that makes a trainer on 16 episodes per iteration, in two micro-batches and two passes."""

    def make(model=None, reward_funcs=count_w3, **given):
        own = ("eval_dataset", "reward_adapter", "ptx_dataset", "callbacks", "optimizers")
        parts = {name: given.pop(name) for name in own if name in given}
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": given.get("gradient_accumulation_steps", 2),
            "max_completion_length": 8,
            "max_steps": 4,
            "kl_budget": None,
            "learning_rate": 1e-2,
            "value_learning_rate": 1e-2,
            "value_pretraining_passes": 0,
            "value_num_iterations": None,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        return PPOTrainer(
            model=model or tiny_policy(),
            reward_funcs=reward_funcs,
            args=PPOConfig(**defaults | given),
            train_dataset=prompts,
            processing_class=tokenizer,
            **parts,
        )

    return make


@pytest.fixture
def reward_adapter(make_reward_adapter):
    return make_reward_adapter(5)


def weights(trainer, *adapters):
    """Everything the adapters and heads hold, copied."""
    roles = trainer.roles
    held = {f"{a}/{n}": p.detach().clone() for a in adapters for n, p in roles.parameters(a).items()}
    return held | {f"{a}/head": roles.heads[a].weight.detach().clone() for a in adapters if a in roles.heads}


def moved(before, after):
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- the first step


def test_kl_is_zero_and_the_ratio_one_before_the_policy_has_moved(make_trainer, reward_adapter):
    trainer = make_trainer(reward_adapter=reward_adapter)
    trainer.train()
    assert history(trainer, "kl")[0] == 0
    assert history(trainer, "ratio")[0] == 1
    assert history(trainer, "clip_ratio/region_mean")[0] == 0
    assert history(trainer, "kl")[1] > 0  # the second iteration


def test_dropout_is_off_so_that_the_ratio_starts_at_one(make_trainer, tiny_llama):
    model = get_peft_model(
        tiny_llama(),
        LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False),
    )
    trainer = make_trainer(model, max_steps=1)
    trainer.train()
    assert history(trainer, "ratio")[0] == 1


def test_dropout_that_layers_call_as_a_function_is_off_too(make_trainer, tiny_llama):
    base = tiny_llama()
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = make_trainer(model, max_steps=1)
    trainer.train()
    assert (history(trainer, "kl")[0], history(trainer, "ratio")[0]) == (0, 1)
    assert trainer.roles.trunk_layers == 2


def test_a_mixture_of_experts_trains_without_the_balancing_loss_of_its_frozen_routers(make_trainer, tiny_llama):
    torch.manual_seed(0)
    shape = tiny_llama().config.to_diff_dict()
    shape = {k: v for k, v in shape.items() if k not in ("model_type", "architectures")}
    base = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = make_trainer(get_peft_model(base, lora), max_steps=2)
    trainer.train()
    assert (history(trainer, "kl")[0], history(trainer, "ratio")[0]) == (0, 1)
    assert not history(trainer, "aux_loss")


def test_kl_is_zero_at_the_start_on_a_4_bit_base(make_trainer, tmp_path, tiny_llama):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    )
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    trainer = make_trainer(model)
    assert {p.dtype for a in (POLICY, REFERENCE, VALUE) for p in trainer.roles.parameters(a).values()} == {
        torch.float32
    }
    trainer.train()
    assert history(trainer, "kl")[0] == 0


# ---- what trains


def test_policy_and_critic_move_above_the_trunk_and_nothing_else_does(make_trainer, reward_adapter):
    trainer = make_trainer(reward_adapter=reward_adapter)
    roles = (POLICY, REFERENCE, REWARD, VALUE)
    before = weights(trainer, *roles)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    changed = moved(before, weights(trainer, *roles))
    upper = {n for n in before if ".layers.2." in n or ".layers.3." in n}
    assert changed == {n for n in upper if n.startswith((POLICY, VALUE))} | {"value/head"}
    assert not moved(base, dict(trainer.model.named_parameters()))


def test_the_optimizer_holds_the_upper_layers_and_the_value_head_each_with_its_learning_rate(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, value_learning_rate=1e-4)
    groups = trainer.create_optimizer().param_groups
    held = {id(p): group["lr"] for group in groups for p in group["params"]}
    wanted = {id(p): 1e-3 for p in trainer.roles.trained[POLICY]} | {id(p): 1e-4 for p in trainer.roles.trained[VALUE]}
    assert held == wanted


def test_an_lm_head_trained_with_the_adapter_is_in_the_optimizer_once(make_trainer, tiny_llama):
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = make_trainer(get_peft_model(tiny_llama(), lora))
    policy, critic = trainer.create_optimizer().param_groups[0]["params"], trainer.optimizer.param_groups[-1]["params"]
    assert {id(p) for p in policy} == {id(p) for p in trainer.roles.trained[POLICY]}
    assert {id(p) for p in critic} == {id(p) for p in trainer.roles.trained[VALUE]}
    before = weights(trainer, POLICY)
    trainer.train()
    assert "default/base_model.model.lm_head.weight" in moved(before, weights(trainer, POLICY))


def test_a_frozen_critic_does_not_move(make_trainer):
    trainer = make_trainer(freeze_value=True)
    before = weights(trainer, POLICY, VALUE)
    trainer.train()
    changed = moved(before, weights(trainer, POLICY, VALUE))
    assert changed and not any(name.startswith(VALUE) for name in changed)


def test_the_policys_step_does_not_depend_on_the_critics_gradient(make_trainer, tiny_policy):
    """A joint gradient norm would let a large value loss shrink the policy's step."""
    results = []
    for clip in (1.0, 1e-6):
        trainer = make_trainer(tiny_policy(), max_steps=1, value_max_grad_norm=clip, max_grad_norm=0.01)
        trainer.train()
        results.append(weights(trainer, POLICY))
    assert not moved(*results)


def test_weights_after_training_with_checkpointing_equal_those_without(make_trainer, tiny_policy, reward_adapter):
    """Checkpointing recomputes with the adapter that is active in the backward pass: no role may be switched before."""
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(tiny_policy(), reward_adapter=reward_adapter, gradient_checkpointing=checkpointing)
        trainer.train()
        results.append(weights(trainer, POLICY, VALUE))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, msg=name)


def test_weights_after_training_with_the_trunk_equal_those_without(make_trainer, tiny_policy, reward_adapter):
    results = []
    for trunk in (True, False):
        trainer = make_trainer(tiny_policy(), reward_adapter=reward_adapter)
        assert trainer.roles.trunk_layers == 2
        if not trunk:
            trainer.roles.trunk_layers = 0
        trainer.train()
        results.append(weights(trainer, POLICY, VALUE))
    assert not moved(*results)


def test_a_trunk_that_changes_the_output_is_given_up_with_a_warning(make_trainer, caplog):
    trainer = make_trainer(max_steps=1)
    honest = trainer.roles.trunk_states
    trainer.roles.trunk_states = lambda *batch: honest(*batch) * 1.5
    trainer.train()
    assert trainer.roles.trunk_layers == 0
    assert "going without it" in caplog.text


def test_the_loss_does_not_depend_on_the_micro_batch(make_trainer, tiny_policy):
    results = []
    for size in (16, 4):
        trainer = make_trainer(
            tiny_policy(), per_device_train_batch_size=size, gradient_accumulation_steps=16 // size, max_steps=1
        )
        trainer.train()
        results.append(weights(trainer, POLICY, VALUE))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=2e-4, rtol=1e-3, msg=name)


# ---- what is computed


def test_values_rewards_and_logps_speak_of_the_same_token(make_trainer):
    """The value of token i is read where token i is predicted from; the score is paid at the last token."""
    trainer = make_trainer()
    rollout = trainer._rolled_out([[5, 6], [7, 8, 9]], [[10, 11, 1], [12]])
    assert rollout.input_ids.tolist() == [[0, 5, 6, 10, 11, 1], [7, 8, 9, 12, 0, 0]]
    assert rollout.mask.tolist() == [[True, True, True], [True, False, False]]
    with torch.no_grad(), trainer.roles.active(VALUE):
        trainer.roles.heads[VALUE].weight.data.normal_()
        values = trainer._values(rollout.input_ids, rollout.attention_mask, 3)
        unpadded = trainer.roles.hidden_states(torch.tensor([[7, 8, 9, 12]]), torch.ones(1, 4, dtype=torch.long))
    torch.testing.assert_close(values[1, 0], trainer.roles.scalars(VALUE, unpadded)[0, 2])


def test_log_probabilities_of_padded_rows_equal_those_of_each_row_alone(make_trainer):
    trainer = make_trainer()
    prompts, completions = [[5, 6], [7, 8, 9]], [[10, 11, 1], [12]]
    rollout = trainer._rolled_out(prompts, completions)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        alone = selective_log_softmax(logits, torch.tensor(completion))
        torch.testing.assert_close(rollout.logps[row, : len(completion)], alone)


def test_trls_fused_head_which_serves_on_a_gpu_gives_the_same_log_probabilities_and_gradients(make_trainer):
    trainer = make_trainer()
    rollout = trainer._rolled_out([[5, 6], [7, 8, 9]], [[10, 11, 1], [12]])
    [both] = rollout.micro_batches
    mask = both.of_completions(rollout.mask)
    results = []
    for score in (trainer._token_logps, partial(GRPOTrainer._get_per_token_logps_and_entropies, trainer)):
        trainer.model.zero_grad()
        with trainer.roles.trunk_given(rollout.trunk[0]):
            kwargs = {} if score == trainer._token_logps else {"compute_entropy": True}
            logps, entropies = score(trainer.model, *rollout.inputs(both), 3, **kwargs)[:2]
        (logps * mask).sum().backward()
        grads = [p.grad.clone() for p in trainer.roles.trained[POLICY]]
        results.append([logps.detach()[mask], entropies.detach()[mask], *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_completions_are_sampled_from_the_adapter_being_trained(make_trainer):
    """In one framework every rollout came from the base model, with finite losses."""
    trainer = make_trainer()
    trainer.train()
    prompt = torch.tensor([[5, 6, 7]])
    sampled = trainer.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=True,
        output_logits=True, return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip
    completion = sampled.sequences[0, 3:].tolist()
    by_sampler = selective_log_softmax(torch.stack(sampled.logits, 1), sampled.sequences[:, 3:])[0]
    by_policy = trainer._rolled_out([[5, 6, 7]], [completion])
    torch.testing.assert_close(by_sampler, by_policy.logps[0])
    assert not torch.allclose(by_sampler, by_policy.ref_logps[0])


def test_rollouts_in_chunks_have_every_prompt_once_and_in_order(make_trainer, monkeypatch):
    trainer = make_trainer(rollout_batch_size=3)
    seen = []
    original = trainer.model.generate
    monkeypatch.setattr(trainer.model, "generate", lambda **kw: seen.append(kw["input_ids"].tolist()) or original(**kw))
    prompts = [[5 + i] for i in range(8)]
    completions, _ = trainer._generate_single_turn(prompts, None, {}, 1)
    assert [len(chunk) for chunk in seen] == [3, 3, 2] and [ids for chunk in seen for ids in chunk] == prompts
    assert len(completions) == 8


def test_episodes_of_many_lengths_go_through_in_few_shapes(make_trainer):
    """Kernels and allocators keep memory for each shape: widths are multiples, up to that of the rollout batch."""
    trainer = make_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=16)
    rollout = trainer._rolled_out([[5] * n for n in range(1, 41)], [[6] * n for n in range(40, 0, -1)])
    shapes = {trunk.shape[1] for trunk in rollout.trunk}
    widths = {16, 32, 40}
    assert len(rollout.trunk) == 40 and shapes <= {p + t for p in widths for t in widths}


def test_long_prompts_are_read_by_chunks_with_the_same_completions(make_trainer, monkeypatch):
    trainer = make_trainer()
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15], [16, 17, 18, 19, 20]]

    def sampled(tokens_at_once):
        monkeypatch.setitem(portions.TOKENS, "cpu", tokens_at_once)
        torch.manual_seed(0)
        return trainer._generate_single_turn(prompts, None, {}, 1)[0], trainer.generation_config.prefill_chunk_size

    (whole, none), (by_chunks, chunk) = sampled(1024), sampled(8)
    assert (none, chunk) == (None, 2) and whole == by_chunks

    trainer.generation_kwargs["prefill_chunk_size"] = 3  # what is given stays
    assert sampled(8) == (whole, 3)


def test_nothing_of_a_rollout_batch_is_kept_while_the_next_is_generated(make_trainer):
    trainer = make_trainer(max_steps=6)
    states, alive = [], []
    score, generate = trainer._rolled_out, trainer._generate_single_turn

    def scored(*args, **kwargs):
        rollout = score(*args, **kwargs)
        if kwargs:  # not of the self-test
            states.extend(weakref.ref(trunk) for trunk in rollout.trunk)
        return rollout

    def generated(*args):
        alive.append(sum(state() is not None for state in states))
        return generate(*args)

    trainer._rolled_out, trainer._generate_single_turn = scored, generated
    trainer.train()
    assert alive == [0, 0, 0] and len(states) == 6


def test_each_micro_batch_is_as_wide_as_its_longest_episode_and_the_ratio_still_starts_at_one(make_trainer, prompts):
    """Prompts of 2 to 4 words and one of 30: seven of eight micro-batches never see the width of the longest."""
    trainer = make_trainer(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        max_steps=2,
        max_completion_length=3,
        pad_to_multiple_of=1,
    )
    long = "w1 " * 30
    trainer.train_dataset = Dataset.from_dict(
        {"prompt": [long if i % 16 == 3 else p for i, p in enumerate(prompts["prompt"])]}
    )
    widths = []
    layer = trainer.roles.layers[-1]
    layer.register_forward_hook(lambda m, args, out: widths.append(out.size(1)) if out.requires_grad else None)
    trainer.train()
    assert max(widths) > 30
    assert sorted(widths)[len(widths) // 2] <= 4 + 3
    assert history(trainer, "ratio")[0] == 1
    assert history(trainer, "kl")[0] == 0


def test_the_lm_head_sees_the_completion_alone(make_trainer):
    trainer = make_trainer(max_steps=1, max_completion_length=4)
    shapes = set()
    trainer.model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.add(args[0].shape[:2]))
    trainer.train()
    assert max(width for rows, width in shapes if rows > 1) <= 4 + 1
    assert (
        max(width for rows, width in shapes if rows == 1) <= 8 * 4
    )  # the tokens of a micro-batch, to compare policies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_is_the_sum_over_the_vocabulary_at_each_token(make_trainer, monkeypatch, temperature):
    monkeypatch.setitem(KL_LOGITS, "cpu", 3 * 43)  # three tokens at once, of a vocabulary of 43
    trainer = make_trainer(temperature=temperature, max_steps=3, learning_rate=0.05)
    trainer.train()
    rollout = trainer._rolled_out([[5, 6], [7]], [[10, 11, 12, 1], [10, 11]])
    logps = []
    for adapter in (POLICY, REFERENCE):
        with torch.no_grad(), trainer.roles.active(adapter):
            logits = trainer.model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask).logits
        logps.append((logits[:, -5:-1] / temperature).log_softmax(-1))
    exact = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)
    assert exact[rollout.mask].min() > 1e-4  # the policy has moved
    torch.testing.assert_close(rollout.kl, exact * rollout.mask, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "offset", "tolerance"),
    [(16.0, 0.0, 1e-3), (1 / 16, 0.0, 1e-3), (1.0, 5.0, 0.1)],  # rounding of the sum can change a sampled token
)
def test_the_critic_learns_the_same_whatever_the_scale_of_the_reward(
    make_trainer, tiny_policy, scale, offset, tolerance
):
    """Reward and KL coefficient times the same number are the same task; a constant in the reward changes nothing."""

    def trained(scale, offset):
        def reward(completions, **kwargs):
            return [scale * (c.split().count("w3") + offset) for c in completions]

        settings = {"beta": 0.1 * scale, "max_steps": 8, "value_pretraining_passes": 2}
        trainer = make_trainer(tiny_policy(), reward_funcs=reward, **settings)
        trainer.train()
        return history(trainer, "explained_variance"), history(trainer, "kl")

    variance, kl = trained(1.0, 0.0)
    assert len(set(variance)) == 4 and kl[-1] > 0
    for found, wanted in zip(trained(scale, offset), (variance, kl), strict=True):
        assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)


def test_a_cut_completion_pays_the_missing_eos_penalty_and_a_score_is_clipped(make_trainer):
    trainer = make_trainer(missing_eos_penalty=1.0, reward_clip=2.0)
    rollout = trainer._rolled_out([[5], [5]], [[10, 1], [10, 11]])
    trainer._scores = torch.tensor([5.0, -0.5])
    scores, ended = trainer._shaped_scores(rollout)
    assert scores.tolist() == [2.0, -1.5]
    assert ended.tolist() == [True, False]


def test_the_kl_penalty_is_in_the_reward_and_not_in_the_loss_too(make_trainer):
    trainer = make_trainer(beta=0.3)
    assert trainer.beta == 0 and trainer.args.beta == 0.3
    trainer.train()
    assert history(trainer, "kl_coef") and set(history(trainer, "kl_coef")) == {0.3}
    last = [entry for entry in trainer.state.log_history if "reward_with_kl" in entry][-1]
    assert last["reward_with_kl"] < last["reward"]


def test_kl_is_logged_at_beta_zero(make_trainer):
    trainer = make_trainer(beta=0.0)
    trainer.train()
    assert history(trainer, "kl")[-1] > 0


def test_the_reward_adapter_scores_what_the_policy_wrote(make_trainer, reward_adapter):
    trainer = make_trainer(reward_funcs=None, reward_adapter=reward_adapter)
    trainer._rollout = trainer._rolled_out([[5, 6], [7, 8, 9]], [[10, 11, 1], [12]])
    together = trainer.reward_model()
    with trainer.roles.active(REWARD):
        alone = [
            trainer.roles.scalars(REWARD, trainer.roles.hidden_states(ids, torch.ones_like(ids))[:, -1]).item()
            for ids in (torch.tensor([[5, 6, 10, 11, 1]]), torch.tensor([[7, 8, 9, 12]]))
        ]
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("how", ["mean", "worst", "mean_minus_std"])
def test_an_ensemble_pays_what_its_members_scores_come_to(make_trainer, make_reward_adapter, monkeypatch, how):
    scored, scores_of = [], PPOTrainer._member_scores
    monkeypatch.setattr(PPOTrainer, "_member_scores", lambda *args: scored.append(scores_of(*args)) or scored[-1])
    folders = [make_reward_adapter(seed) for seed in (5, 6, 7)]
    settings = {"reward_ensemble": how, "reward_spread_coef": 0.5, "max_steps": 1}
    trainer = make_trainer(reward_adapter=folders, reward_funcs=None, **settings)
    trainer.train()
    scores = torch.stack(scored).numpy()
    paid = {
        "mean": scores.mean(0),
        "worst": scores.min(0),
        "mean_minus_std": scores.mean(0) - 0.5 * scores.std(0),
    }
    assert scores.shape == (3, 16)
    assert history(trainer, "reward")[0] == pytest.approx(paid[how].mean(), abs=1e-5)
    assert history(trainer, "members/spread")[0] == pytest.approx(scores.std(0).mean(), abs=1e-5)
    assert [history(trainer, f"members/{name}")[0] for name in ("reward", "reward_1", "reward_2")] == [
        pytest.approx(row.mean(), abs=1e-5) for row in scores
    ]
    assert trainer.roles.trunk_layers == 2


def test_an_ensemble_of_one_equals_the_plain_reward_model_bit_for_bit(make_trainer, tiny_policy, reward_adapter):
    settings = {"reward_funcs": None, "reward_ensemble": "mean_minus_std"}
    plain = make_trainer(tiny_policy(), reward_adapter=reward_adapter, reward_funcs=None)
    plain.train()
    one = make_trainer(tiny_policy(), reward_adapter=[reward_adapter], **settings)  # which seeds the noise anew
    one.train()
    assert not moved(weights(plain, POLICY, VALUE), weights(one, POLICY, VALUE))
    assert history(plain, "reward") == history(one, "reward")
    assert not history(one, "members/reward")


def test_rewards_of_a_model_and_functions_add_up_by_weight(make_trainer, reward_adapter):
    async def length(completions, **kwargs):
        return [float(len(completion.split())) for completion in completions]

    trainer = make_trainer(
        reward_funcs=[count_w3, length], reward_adapter=reward_adapter, reward_weights=[1.0, 0.5, -2.0], max_steps=1
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "reward" in e)
    parts = [entry[f"rewards/{name}/mean"] for name in ("reward_model", "count_w3", "length")]
    assert entry["reward"] == pytest.approx(parts[0] + 0.5 * parts[1] - 2 * parts[2], rel=1e-4)


def test_an_episode_that_no_function_scores_teaches_nothing(make_trainer):
    def first_alone(completions, **kwargs):
        return [1.0] + [None] * (len(completions) - 1)

    trainer = make_trainer(reward_funcs=first_alone, max_steps=1, beta=0.0)
    taught = []
    advantages = trainer._advantages
    trainer._advantages = lambda *args: taught.append(advantages(*args)) or taught[-1]
    trainer.train()
    found = taught[-1][0] if isinstance(taught[-1], tuple) else taught[-1]
    assert found["advantages"][0].any() and not found["advantages"][1:].any()
    torch.testing.assert_close(found["returns"][1:], found["values"][1:])


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_rollout_batch_or_evaluation_without_a_single_score_is_refused(make_trainer, prompts, nothing):
    def late(completions, trainer_state, **kwargs):
        return [nothing if trainer_state.global_step >= 2 else 1.0] * len(completions)

    with pytest.raises(UserError, match=r"no completion got a score at step 2: `late` gave None or NaN .*run the com"):
        make_trainer(reward_funcs=late).train()
    trainer = make_trainer(reward_funcs=late, eval_dataset=prompts.select(range(8)))
    assert trainer.evaluate()["eval_reward"] == 1
    trainer.state.global_step = 2
    with pytest.raises(UserError, match="no completion got a score at step 2"):
        trainer.evaluate()


def failing(completions, trainer_state, **kwargs):
    return [1 / (1 - trainer_state.global_step // 2)] * len(completions)


async def failing_later(completions, trainer_state, **kwargs):
    return failing(completions, trainer_state)


@pytest.mark.parametrize("function", [failing, failing_later, partial(failing, more=1)])
def test_a_reward_function_that_raises_is_told_with_its_own_line_the_step_and_how_to_resume(make_trainer, function):
    line = failing.__code__.co_firstlineno + 1
    name = "failing_later" if function is failing_later else "failing"
    told = (
        rf"^reward function `{name}` at step 2 raised ZeroDivisionError: division by zero \(.*test_ppo.py:{line}\)\. "
    )
    with pytest.raises(UserError, match=told + r".*resume_from_checkpoint=True"):
        make_trainer(reward_funcs=function).train()


# ---- the course of training


def test_ppo_raises_its_reward_and_a_larger_beta_stays_closer_to_the_reference(make_trainer, tiny_policy):
    runs = {}
    for beta in (0.0, 5.0):
        trainer = make_trainer(tiny_policy(), beta=beta, max_steps=60, num_iterations=2, max_completion_length=6)
        trainer.train()
        runs[beta] = [sum(history(trainer, key)[-5:]) / 5 for key in ("reward", "kl")]
        start = sum(history(trainer, "reward")[:3]) / 3
    assert runs[0.0][0] > start + 1
    assert runs[5.0][1] < runs[0.0][1] / 3


def test_the_critic_is_pretrained_on_the_first_rollout_before_the_policy_moves(make_trainer, caplog):
    caplog.set_level("INFO")
    trainer = make_trainer(value_pretraining_passes=8, max_steps=2)
    before, seen = weights(trainer, POLICY, VALUE), []
    pretrain = trainer._pretrain_critic

    def spy(batch):
        pretrain(batch)
        seen.extend(moved(before, weights(trainer, POLICY, VALUE)))
        assert all(p.grad is None for group in trainer.optimizer.param_groups for p in group["params"])

    trainer._pretrain_critic = spy
    trainer.train()
    assert seen and all(name.startswith(VALUE) for name in seen)
    assert len(history(trainer, "ratio")) == 2  # the policy's first step is the run's first step
    after, before = map(float, re.search(r"explains (\S+) of the variance.*\((\S+) before", caplog.text).groups())
    assert after > before + 0.05
    assert history(trainer, "explained_variance")[0] == pytest.approx(before, abs=0.01)  # of returns not seen yet


def test_pretraining_happens_with_a_zero_head_and_not_in_a_resumed_run(make_trainer, tiny_policy, tmp_path, caplog):
    """A head of zeros explains nothing of the variance, and a bar of 0 would have let it pass."""
    caplog.set_level("INFO")
    settings = {"value_pretraining_passes": 1, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    make_trainer(tiny_policy(), output_dir=str(tmp_path / "a"), **settings).train()
    assert caplog.text.count("critic pretrained in 1 passes") == 1
    resumed = make_trainer(tiny_policy(), output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert caplog.text.count("critic pretrained in 1 passes") == 1


def test_the_critic_learns_in_the_first_passes_alone_where_asked_to(make_trainer):
    trainer = make_trainer(num_iterations=3, value_num_iterations=1, max_steps=6)
    trainer.train()
    assert len(history(trainer, "value_loss")) == 2 and len(history(trainer, "ratio")) == 6


def test_passes_end_beyond_target_kl(make_trainer):
    trainer = make_trainer(num_iterations=4, target_kl=1e-7, max_steps=4, learning_rate=0.05)
    trainer.train()
    assert (
        len(history(trainer, "ratio")) == 2
    )  # the first pass has KL 0; the second is beyond; the last two are skipped


def test_training_stops_over_the_kl_budget_and_says_so(make_trainer, caplog):
    trainer = make_trainer(kl_budget=1e-6, max_steps=40, learning_rate=0.05)
    trainer.train()
    assert trainer.state.global_step < 40
    assert "over kl_budget=1e-06" in caplog.text and "Raise beta" in trainer.stop_reason


def test_a_loss_that_is_no_number_ends_the_run_with_a_plain_message(make_trainer):
    trainer = make_trainer(learning_rate=1e30)
    with pytest.raises(UserError, match=r"(?s)the loss became nan at step 1\..*w3.*lower training.learning_rate"):
        trainer.train()


def test_an_infinite_reward_is_refused_with_the_function_and_the_completion(make_trainer):
    def divide(completions, **kwargs):
        return [float("inf")] * len(completions)

    with pytest.raises(UserError, match=r"reward `divide` is inf for the completion .* at step 0"):
        make_trainer(reward_funcs=divide).train()


def test_the_sft_loss_keeps_the_policy_at_the_demonstrations(make_trainer, tiny_policy):
    demonstrations = Dataset.from_list([{"prompt": "w5 w6", "completion": "w7 w8 w9"}] * 4)
    losses = {}
    for coef in (0.0, 1.0):
        trainer = make_trainer(tiny_policy(), max_steps=20, ptx_coef=coef, ptx_dataset=demonstrations if coef else None)
        trainer.train()
        losses[coef] = trainer._rolled_out([[8, 9]], [[10, 11, 12, 1]]).logps.sum().item()
    assert losses[1.0] > losses[0.0] + 2


def test_the_sft_loss_does_not_depend_on_the_temperature_of_the_sampling(make_trainer, tiny_policy):
    demonstrations = Dataset.from_list([{"prompt": "w5 w6", "completion": "w7 w8 w9"}] * 4)
    losses = set()
    for temperature in (1.0, 0.5):
        settings = {"ptx_coef": 1.0, "ptx_dataset": demonstrations, "max_steps": 1, "temperature": temperature}
        trainer = make_trainer(tiny_policy(), **settings)
        trainer.train()
        losses.add(round(history(trainer, "ptx_loss")[0], 5))
    assert len(losses) == 1


@pytest.mark.parametrize("name", ["top_p", "min_p", "repetition_penalty"])
def test_what_samples_from_another_distribution_is_warned_of_by_name(make_trainer, caplog, name):
    make_trainer(**{name: 0.5})
    assert f"{name}=0.5: completions are sampled from another distribution than the policy's" in caplog.text


def test_rollouts_do_not_obey_the_models_own_generation_config(make_trainer, tiny_policy):
    """Real models come with one: `min_p` or a ban on repetitions there would cut what the policy is scored by."""
    prompts, sampled = [[5, 6, 7]] * 4, []
    for own in ({}, {"min_p": 0.9, "no_repeat_ngram_size": 1, "suppress_tokens": [5, 6], "top_k": 1}):
        model = tiny_policy()
        model.get_base_model().generation_config.update(**own)
        trainer = make_trainer(model)
        torch.manual_seed(0)
        sampled.append(trainer._generate_single_turn(prompts, None, {}, 1)[0])
        assert model.get_base_model().generation_config.min_p == own.get("min_p"), "the model keeps its own"
    assert sampled[0] == sampled[1]


def test_held_out_prompts_are_scored_with_the_same_noise_and_the_best_checkpoint_is_kept(make_trainer, prompts):
    trainer = make_trainer(
        eval_dataset=prompts.select(range(16)), eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="objective", greater_is_better=True,
        max_steps=6,
    )  # fmt: skip
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == again["eval_reward"]
    trainer.train()
    objectives = history(trainer, "eval_objective")
    assert trainer.state.best_metric == max(objectives)
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{2 * (objectives.index(max(objectives)) + 1)}"


class Overflow(TrainerCallback):
    """What accelerate sets up for fp16 on a GPU, with torch's own GradScaler, and one gradient that overflows."""

    def __init__(self, role, step):
        self.role, self.step, self.moved, self.trainer = role, step, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        scale_gradients(self.trainer.accelerator)
        self.trainer.roles.trained[self.role][0].register_hook(
            lambda gradient: gradient * float("nan") if self.trainer.state.global_step == self.step else gradient
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = weights(self.trainer, POLICY, VALUE)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.moved.append({name[:3] for name in moved(self.before, weights(self.trainer, POLICY, VALUE))})


@pytest.mark.parametrize("role", [POLICY, VALUE])
def test_with_fp16_one_gradient_that_overflows_costs_one_step(make_trainer, role):
    overflow = Overflow(role, step=2)
    overflow.trainer = trainer = make_trainer(max_steps=6, callbacks=[overflow])
    trainer.train()
    assert overflow.moved == [set() if step == 2 else {"def", "val"} for step in range(6)]
    assert all(weight.isfinite().all() for weight in weights(trainer, POLICY, VALUE).values())


def test_the_critic_is_pretrained_under_the_loss_scale_of_fp16_too(make_trainer):
    plain = make_trainer(max_steps=1, value_pretraining_passes=2)
    plain.train()
    overflow = Overflow(POLICY, step=-1)
    overflow.trainer = scaled = make_trainer(max_steps=1, value_pretraining_passes=2, callbacks=[overflow])
    scaled.train()
    for name, weight in weights(plain, VALUE).items():
        torch.testing.assert_close(weights(scaled, VALUE)[name], weight, atol=1e-4, rtol=1e-3)


def test_a_step_that_fp16_could_not_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match="target_kl can leave a step without any gradient: use bf16, or kl_budget"):
        PPOConfig(str(tmp_path), fp16=True, bf16=False, use_cpu=True, target_kl=0.1, freeze_value=True)


def test_an_optimizer_of_the_callers_own_trains_the_critic_too(make_trainer, tiny_policy):
    policy = tiny_policy()
    optimizer = torch.optim.SGD([p for n, p in policy.named_parameters() if "lora" in n], lr=1e-2)
    trainer = make_trainer(policy, optimizers=(optimizer, None), max_steps=2)
    before = weights(trainer, VALUE)
    trainer.train()
    assert "value/head" in moved(before, weights(trainer, VALUE))
    assert trainer.optimizer.optimizer is optimizer


def test_evaluations_are_means_over_episodes_and_an_objective_keeps_its_coefficient(make_trainer):
    """17 prompts in batches of 8: the last batch is one episode, which counts once."""

    def number(prompts, **kwargs):
        return [float(prompt.split()[0][1:]) for prompt in prompts]

    rows = Dataset.from_dict({"prompt": [f"w{0 if i < 16 else 34}" for i in range(17)]})
    trainer = make_trainer(reward_funcs=number, eval_dataset=rows, per_device_eval_batch_size=8, beta=0.5)
    trainer.kl.coef = 100.0  # where an adaptive coefficient may have got to
    trainer.roles.layer_parameters(POLICY, trainer.roles.layers)[
        "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    ].data.mul_(3)
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx(34 / 17)
    assert metrics["eval_kl"] > 0.01
    assert metrics["eval_objective"] == pytest.approx(34 / 17 - 0.5 * metrics["eval_kl"])


def test_over_the_kl_budget_callbacks_see_no_objective_either(make_trainer, prompts):
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(metrics["eval_objective"])

    settings = {"eval_dataset": prompts.select(range(4)), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    make_trainer(kl_budget=1e-9, learning_rate=0.05, callbacks=[Watch()], **settings).train()
    assert seen == [-float("inf")]


# ---- checkpoints


@pytest.mark.parametrize("broken_off_at", [4, 8])  # save_steps, rounded up to an iteration; an epoch is 4 steps
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    make_trainer, tiny_policy, reward_adapter, tmp_path, broken_off_at
):
    settings = {
        "reward_adapter": reward_adapter, "max_steps": 12, "save_strategy": "steps", "save_steps": 3, "kl_target": 0.1,
        "value_pretraining_passes": 2, "lr_scheduler_type": "linear",
        "ptx_coef": 0.1, "ptx_dataset": Dataset.from_list([{"prompt": "w5", "completion": "w7"}] * 9),
    }  # fmt: skip
    unbroken = make_trainer(tiny_policy(), output_dir=str(tmp_path / "a"), **settings)
    unbroken.train()
    resumed = make_trainer(tiny_policy(), output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{broken_off_at}"))
    assert not moved(weights(unbroken, POLICY, VALUE), weights(resumed, POLICY, VALUE))
    assert history(resumed, "reward") == history(unbroken, "reward")
    assert unbroken.kl.coef == resumed.kl.coef


def test_why_training_stopped_is_known_after_a_resume_and_with_the_best_checkpoint(make_trainer, tmp_path):
    settings = {"kl_budget": 1e-6, "max_steps": 40, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    settings |= {"num_iterations": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}
    stopped = make_trainer(**settings)
    stopped.train()
    last, first = f"checkpoint-{stopped.state.global_step}", "checkpoint-1"
    resumed = make_trainer(**settings)
    for checkpoint in (last, first):
        resumed._load_from_checkpoint(str(tmp_path / "out" / checkpoint))
        assert stopped.stop_reason is not None and resumed.stop_reason == stopped.stop_reason


def test_a_resumed_run_with_an_ensemble_equals_an_unbroken_one(
    make_trainer, make_reward_adapter, tiny_policy, tmp_path
):
    folders = [make_reward_adapter(seed) for seed in (5, 6)]
    settings = {"reward_adapter": folders, "reward_ensemble": "worst", "save_strategy": "steps", "save_steps": 2}
    unbroken = make_trainer(tiny_policy(), output_dir=str(tmp_path / "a"), **settings)
    unbroken.train()
    resumed = make_trainer(tiny_policy(), output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert not moved(weights(unbroken, POLICY, VALUE), weights(resumed, POLICY, VALUE))
    assert history(resumed, "members/reward_1") == history(unbroken, "members/reward_1")


def test_a_checkpoint_holds_policy_critic_and_state_and_no_frozen_role(make_trainer, reward_adapter, tmp_path):
    make_trainer(reward_adapter=reward_adapter, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "ppo_state.json",
        "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
        "training_args.bin",
        "value/adapter_config.json", "value/adapter_model.safetensors", "value/head.json",
    ]  # fmt: skip


def test_checkpoints_and_evaluations_are_moved_to_iteration_boundaries_and_told(make_trainer, caplog):
    trainer = make_trainer(save_strategy="steps", save_steps=5, num_iterations=2, max_steps=2)
    trainer.train()
    assert trainer.state.save_steps == 6
    assert "save_steps=5 rounded up to 6" in caplog.text


def test_a_fraction_of_the_training_is_rounded_to_iterations_too(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=0.25, num_iterations=2, max_steps=12).train()  # 3 steps: no boundary
    assert sorted(int(p.name[11:]) for p in (tmp_path / "out").glob("checkpoint-*")) == [4, 8, 12]


@pytest.mark.parametrize("broken_off_at", [4, 8, 12, 20])
def test_a_resume_in_any_epoch_sees_the_prompts_of_an_unbroken_run(make_trainer, broken_off_at):
    """64 prompts, 16 an iteration of two steps: an epoch is 8 steps."""
    trainer = make_trainer(num_iterations=2, max_steps=24)
    sampler, wanted = trainer._get_train_sampler(), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        wanted.append(list(sampler))
    assert wanted[0] != wanted[1] != wanted[2]
    epoch = broken_off_at // 8
    resumed = make_trainer(num_iterations=2, max_steps=24)._get_train_sampler()
    resumed.set_epoch(epoch)
    assert list(resumed) == wanted[epoch]


def test_a_saved_critic_can_start_the_next_run(make_trainer, tiny_policy, tmp_path):
    first = make_trainer(max_steps=2)
    first.train()
    first.save_model(str(tmp_path / "first"))
    second = make_trainer(tiny_policy(), value_init=str(tmp_path / "first" / "value"))
    assert not {name for name in moved(weights(first, VALUE), weights(second, VALUE)) if "head" not in name}
    # the head comes back in units of the reward
    hidden = torch.randn(3, 32)
    predicted = first.return_scale.restored(first.roles.scalars(VALUE, hidden))
    torch.testing.assert_close(second.roles.scalars(VALUE, hidden), predicted)


def test_all_trained_weights_are_equal_on_two_processes(tmp_path):
    """The critic's passes do not go through the wrapped model, so its gradients have to be reduced by hand."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from rlhf_recipes import PPOConfig, PPOTrainer
        tokenizer = conftest.tokenizer.__wrapped__()
        base = conftest.tiny_llama.__wrapped__()()
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, lora)
        trainer = PPOTrainer(
            model=model,
            reward_funcs=lambda completions, **kw: [float(c.split().count("w3")) for c in completions],
            args=PPOConfig({str(tmp_path)!r}, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4,
                steps_per_generation=2,
                max_completion_length=6, learning_rate=1e-2, value_learning_rate=1e-2, value_pretraining_passes=0,
                bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, ddp_backend="gloo"),
            train_dataset=Dataset.from_dict({{"prompt": [f"w{{i}} w{{j}}" for i in range(8) for j in range(8)]}}),
            processing_class=tokenizer,
        )
        trainer.train()
        held = {{f"{{a}}/{{n}}": p for a in ("default", "value") for n, p in trainer.roles.parameters(a).items()}}
        held["head"] = trainer.roles.heads["value"].weight
        torch.save({{n: p.detach() for n, p in held.items()}}, {str(tmp_path)!r} + f"/rank{{os.environ['RANK']}}.pt")
        """)
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "PYTHONPATH": str(Path(__file__).parents[1])},
            stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    assert not moved(*ranks)


# ---- used alone, as TRL's trainers are


def test_the_defaults_are_those_of_the_recipe():
    """conf/ppo.yaml sets nothing that a script would have to set again."""
    args = PPOConfig("out", use_cpu=True)
    recipe = build(PPOConfig, compose("ppo", ["model=qwen2.5-0.5b"]).training, output_dir="out", use_cpu=True)
    different = {name for name, value in args.to_dict().items() if recipe.to_dict()[name] != value}
    assert different == {"save_total_limit"}
    assert (args.generation_batch_size, args.steps_per_iteration, args.max_completion_length) == (128, 8, 128)
    assert (args.max_steps, args.kl_budget, args.lr_scheduler_type) == (800, 50, "constant")
    assert (args.eval_steps, args.save_steps, args.load_best_model_at_end) == (80, 80, True)
    assert (args.metric_for_best_model, args.greater_is_better, args.bf16) == ("objective", True, False)


@pytest.mark.parametrize(
    ("rows", "accumulated", "episodes", "per_iteration"), [(2, 16, 128, 4), (6, 4, 144, 6), (64, 4, 256, 1)]
)
def test_a_rollout_batch_is_as_many_whole_optimizer_steps_as_make_128_episodes(
    rows, accumulated, episodes, per_iteration
):
    args = PPOConfig("out", use_cpu=True, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated)
    assert args.generation_batch_size == episodes == rows * args.steps_per_generation
    assert args.steps_per_iteration == 2 * per_iteration
    assert PPOConfig("out", use_cpu=True, generation_batch_size=64).steps_per_generation == 8


def test_the_best_checkpoint_is_kept_only_where_it_can_be():
    for settings, keeps in (
        ({"save_strategy": "no"}, False),
        ({"eval_strategy": "no"}, False),
        ({"eval_strategy": "epoch"}, False),
        ({"save_strategy": "best"}, True),
        ({"save_steps": 40}, True),
    ):
        assert PPOConfig("out", use_cpu=True, **settings).load_best_model_at_end is keeps, settings


def test_the_best_checkpoint_is_the_one_with_the_best_objective_without_a_word(make_trainer, prompts):
    held_out = prompts.select(range(16))
    trainer = make_trainer(eval_dataset=held_out, save_strategy="steps", save_steps=2, load_best_model_at_end=True)
    trainer.train()
    assert trainer.state.best_metric == max(history(trainer, "eval_objective"))


def test_without_held_out_prompts_the_last_checkpoint_counts_and_a_warning_says_so(make_trainer, caplog):
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    assert "the last checkpoint counts, not the best" in caplog.text
    assert trainer.state.best_metric is None


def test_several_sets_of_held_out_prompts_are_refused(make_trainer, prompts):
    with pytest.raises(UserError, match=r"not several \(short, long\)"):
        make_trainer(eval_dataset={"short": prompts.select(range(8)), "long": prompts.select(range(8, 16))})


def test_fewer_prompts_than_a_rollout_batch_are_refused(make_trainer):
    with pytest.raises(UserError, match=r"64 training prompts .* do not fill a rollout batch, which takes 72"):
        make_trainer(steps_per_generation=9, gradient_accumulation_steps=9)


def test_prompts_that_fill_no_rollout_batch_are_counted(make_trainer, caplog):
    caplog.set_level("INFO", "rlhf_recipes")
    make_trainer(steps_per_generation=5, gradient_accumulation_steps=5)
    assert "24 of 64 prompts, drawn anew, are left out of each epoch: a rollout batch takes 40" in caplog.text
    make_trainer(num_generations=4, steps_per_generation=16)  # 128 episodes of 32 prompts


def test_several_generations_are_as_many_episodes_of_each_prompt_with_advantages_of_their_own(make_trainer):
    seen, trainer = [], make_trainer(num_generations=4, max_steps=1, whiten_advantages=False)
    trainer.reward_funcs = [lambda prompts, **kw: seen.extend(prompts) or [float(i) for i in range(len(prompts))]]
    trainer.train()
    assert len(seen) == 16 and sorted(map(seen.count, {*seen})) == [4, 4, 4, 4]
    assert len({*trainer._logs["advantages"]}) == 16


def test_a_model_folder_with_a_peft_config_is_enough(tmp_path, tiny_llama, tokenizer, prompts):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = PPOTrainer(
        model=str(tmp_path / "base"),
        reward_funcs=count_w3,
        args=PPOConfig(
            str(tmp_path / "out"), max_steps=2, max_completion_length=4, use_cpu=True, generation_batch_size=32,
            learning_rate=1e-2, disable_tqdm=True,
        ),
        train_dataset=prompts,
        peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = weights(trainer, POLICY)
    trainer.train()
    assert moved(before, weights(trainer, POLICY))


def test_conversational_prompts_are_rendered_by_the_chat_template(make_trainer, tokenizer, prompts):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(prompts)

    trainer = make_trainer(reward_funcs=reward, max_steps=1)
    trainer.train_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts["prompt"]])
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}"
    try:
        trainer.train()
    finally:
        tokenizer.chat_template = None
    assert seen[0][0][0]["role"] == "user" and seen[0][1][0]["role"] == "assistant"


# ---- refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"scale_rewards": "batch"}, "scale_rewards='batch' has no meaning in PPO"),
        ({"loss_type": "grpo"}, "loss_type"),
        ({"mask_truncated_completions": True}, "use missing_eos_penalty"),
        ({"gamma": 1.5, "lam": -1.0}, "gamma=1.5 must be at least 0 and at most 1; lam=-1.0"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be finite"),
        ({"temperature": 0.0, "kl_horizon": 0}, "temperature=0.0 must be above 0; kl_horizon=0 must be at least 1"),
        ({"cliprange_value": -0.2}, "cliprange_value=-0.2 must be above 0"),
        ({"generation_kwargs": {"top_p": 0.5}}, "generation_kwargs: top_p is an option of its own, top_p"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "an option of its own, max_completion_length"),
        (
            {"generation_kwargs": '{"no_repeat_ngram_size": 2}'},
            "no_repeat_ngram_size may sample from another distribution .*; what can be given is prefill_chunk_size, ",
        ),
        ({"value_init": "nowhere"}, "value_init=nowhere: there is no adapter_model.safetensors in such a folder; want"),
        ({"max_completion_length": None}, "max_completion_length=None must be a number of tokens"),
        ({"kl_target": 1.0, "beta": 0.0}, "kl_target needs a beta above 0"),
        ({"neftune_noise_alpha": 5.0, "data_seed": 3}, "neftune_noise_alpha=5.0 has no meaning in PPO: .*use seed"),
        ({"label_names": ["x"]}, "there are no labels"),
        ({"num_train_epochs": 2}, "num_train_epochs=2 does nothing while max_steps=800 decides; set max_steps=-1"),
        ({"num_generations": 3}, "num_generations=3 does not divide the 128 episodes"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "no multiple of gradient_accumulation_steps=4"),
        ({"steps_per_generation": 1, "per_device_train_batch_size": 1}, "rollout batch of one episode"),
        ({"router_aux_loss_coef": 0.1}, "0 or null: routers are frozen"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "no gradients above frozen layers; leave it out"),
    ],
)
def test_config_refuses_what_cannot_work_and_says_what_to_do(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig("out", bf16=False, use_cpu=True, **kwargs)


def test_a_model_without_an_adapter_is_refused(tiny_llama, tokenizer, prompts):
    with pytest.raises(UserError, match="pass a PeftModel, or a `peft_config`"):
        PPOTrainer(
            tiny_llama(), count_w3, PPOConfig("out", bf16=False), train_dataset=prompts, processing_class=tokenizer
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(task_type="CAUSAL_LM"), "IA3 is no LoRA"),
        (LoHaConfig(task_type="CAUSAL_LM"), "LOHA is no LoRA"),
        (VeraConfig(task_type="CAUSAL_LM"), "VERA is no LoRA"),
        (OFTConfig(task_type="CAUSAL_LM"), "OFT is no LoRA"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING is no LoRA"),
        (LoraConfig(task_type="CAUSAL_LM", bias="all"), "bias=all: it trains the base's own biases"),
        (
            LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa_niter_4"),
            "changes the base's weights.*conversion",
        ),
        (LoraConfig(task_type="CAUSAL_LM", init_lora_weights="olora"), "use true, gaussian, orthogonal"),
    ],
)
def test_an_adapter_that_cannot_share_the_base_is_refused_before_a_model_is_loaded(prompts, config, message):
    with pytest.raises(UserError, match=message):
        PPOTrainer("no-such-model", count_w3, PPOConfig("out", bf16=False), prompts, peft_config=config)


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"use_rslora": True}])
def test_other_kinds_of_lora_train_as_plain_lora_does(make_trainer, tiny_llama, adapter):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **adapter)
    trainer = make_trainer(get_peft_model(tiny_llama(), lora), max_steps=3)
    before = weights(trainer, POLICY, VALUE)
    trainer.train()
    assert history(trainer, "ratio")[0] == 1 and history(trainer, "kl")[0] == 0
    upper = {n for n in before if ".layers.2." in n or ".layers.3." in n}
    assert moved(before, weights(trainer, POLICY, VALUE)) == upper | {"value/head"}


def test_a_trunk_over_all_layers_with_an_adapter_is_refused(make_trainer, tiny_llama):
    lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 1], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=r"nothing would be trained: all layers with an adapter are frozen, 2 of 4"):
        make_trainer(get_peft_model(tiny_llama(), lora))


def test_an_adapter_without_a_head_is_no_critic(make_trainer, tiny_policy, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match="an adapter without a scalar head is no critic"):
        make_trainer(value_init=str(tmp_path / "sft"))


def test_a_reward_model_that_a_stage_made_on_another_base_is_refused(make_trainer, reward_adapter):
    (reward_adapter / "manifest.json").write_text('{"schema": 1, "base": "0123456789abcdef"}')
    with pytest.raises(UserError, match=r"adapters of another:\n.*reward5: 0123456789abcdef"):
        make_trainer(reward_adapter=reward_adapter)


def test_a_second_trainer_on_one_model_takes_its_policy_as_it_is_now(make_trainer, tiny_policy, reward_adapter):
    model = tiny_policy()
    for _ in range(2):
        trainer = make_trainer(model, reward_adapter=reward_adapter, max_steps=4)
        trainer.train()
        assert (history(trainer, "kl")[0], history(trainer, "ratio")[0]) == (0, 1)
        assert history(trainer, "kl")[1] > 0


@pytest.mark.parametrize("given", [{"tools": [len]}, {"environment_factory": dict}, {"rollout_func": len}])
def test_tokens_that_the_policy_did_not_write_are_refused(tiny_policy, tokenizer, prompts, given):
    args = PPOConfig("out", bf16=False, use_cpu=True)
    with pytest.raises(UserError, match="completions would hold tokens that the policy did not write"):
        PPOTrainer(tiny_policy(), count_w3, args, prompts, processing_class=tokenizer, **given)


def test_images_which_only_generation_would_see_are_refused(tiny_policy, tokenizer, prompts):
    rows = prompts.add_column("image", [None] * len(prompts))
    with pytest.raises(UserError, match="the prompts have image, which PPOTrainer would generate from, but not score"):
        PPOTrainer(tiny_policy(), count_w3, PPOConfig("out", bf16=False), rows, processing_class=tokenizer)


def test_an_adapter_without_a_head_is_no_reward_model(make_trainer, tiny_policy, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "sft")
    with pytest.raises(UserError, match="no scalar head: it is no reward model"):
        make_trainer(reward_adapter=tmp_path / "sft")


def test_a_policy_is_no_critic(make_trainer, tiny_policy, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "sft")
    with pytest.raises(ValueError, match=r"value_init=.*sft: an adapter without a scalar head is no critic; want"):
        make_trainer(value_init=str(tmp_path / "sft"))


@pytest.fixture
def turns(tokenizer):
    """A tokenizer whose chat template ends a turn with another special token than its EOS."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["w39"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} w39 {% endfor %}"
        "{{ 'w2 ' if add_generation_prompt }}"
    )
    return tokenizer


def test_a_script_too_stops_rollouts_and_learns_demonstrations_to_the_templates_end_of_turn(
    tiny_policy, turns, tmp_path
):
    said = [{"role": ("user", "assistant")[i % 2], "content": f"w{i + 10}"} for i in range(4)]
    trainer = PPOTrainer(
        tiny_policy(),
        count_w3,
        PPOConfig(str(tmp_path), bf16=False, use_cpu=True, ptx_coef=0.1, report_to="none"),
        Dataset.from_list([{"prompt": said[:1]}] * 128),
        processing_class=turns,
        ptx_dataset=Dataset.from_list([{"messages": said}]),
    )
    end = turns.convert_tokens_to_ids("w39")
    assert end in trainer.eos_token_ids and trainer.generation_config.eos_token_id == trainer.eos_token_ids
    batch = trainer._demonstrations([2])
    #                                w1 w10  w39 w2 | w11 w39  w1 w12 w39 w2  w13 w39
    assert batch["ptx_ids"][0].tolist() == [[4, 13, end, 5, 14, end, 4, 15, end, 5, 16, end]] * 2
    assert batch["ptx_mask"][0].int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1]] * 2
    assert batch["ptx_tokens"] == 8


def test_ptx_needs_demonstrations(make_trainer):
    with pytest.raises(UserError, match=r"ptx_coef=0\.5 needs a ptx_dataset"):
        make_trainer(ptx_coef=0.5)
