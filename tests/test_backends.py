"""Rollouts by CUDA graphs and continuous batching: the policy's completions, and no bit of a weight changed."""

# ruff: noqa: F811 (fixtures of another module)
import time
from types import SimpleNamespace

import pytest
import torch
from test_ppo import count_w3, history, make_trainer, moved, reward_adapter, weights  # noqa: F401
from transformers import StaticCache
from transformers.generation import ContinuousBatchingConfig, ContinuousBatchingManager
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlhf_recipes import PPOConfig
from rlhf_recipes.config import compose
from rlhf_recipes.errors import UserError
from rlhf_recipes.ppo import backends
from rlhf_recipes.roles import POLICY, VALUE

PAGED = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": {"page_size": 16}}
PROMPTS = [[5 + i] * (1 + i % 3) for i in range(10)]


def everything(trainer):
    """All weights that the model and the heads hold, copied."""
    held = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return held | weights(trainer, POLICY, VALUE)


# ---- CUDA graphs


def test_each_decoding_step_but_the_first_is_a_replay_and_samples_the_same(make_trainer, monkeypatch):
    """A stand-in takes the place of the graph alone: it notes the step, and runs it on the same tensors each time."""
    replays = []

    def capture(step):
        outputs = CausalLMOutputWithPast(logits=torch.empty(0))

        def replay():
            replays.append(1)
            for key, value in step().items():
                outputs[key] = value

        return replay, outputs

    trainer = make_trainer(max_completion_length=6, rollout_batch_size=5)
    trainer.generation_config.min_new_tokens = 6

    def sampled():
        torch.manual_seed(0)
        return trainer._generate_single_turn(PROMPTS, None, {}, 1)[0]

    wanted = sampled()
    monkeypatch.setattr(backends, "capture", capture)
    trainer.args.cuda_graphs = True
    assert sampled() == wanted
    assert len(replays) == 2 * 4, "of two chunks; the prompts give the first token, a step as usual the second"
    trainer.args.cuda_graphs = False
    assert sampled() == wanted and len(replays) == 8, "nothing of it stays on the model"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_step_gives_the_logits_of_the_model(tiny_policy):
    model = tiny_policy().cuda().eval().get_base_model()
    step = backends.DecodingStep(model)
    ids = torch.randint(5, 90, (3, 9), device="cuda")
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=9)
        mask = torch.ones(9, 9, dtype=torch.bool, device="cuda").tril()
        for place in range(9):
            position = torch.full((3, 1), place, device="cuda")
            seen = mask[place].expand(3, 1, 1, 9).contiguous()
            given = {"input_ids": ids[:, place : place + 1], "position_ids": position, "attention_mask": seen}
            got = step(cache=cache, use_cache=True, **given).logits[:, 0].clone()
            torch.testing.assert_close(got, model(input_ids=ids[:, : place + 1]).logits[:, -1], rtol=1e-3, atol=1e-4)


# ---- continuous batching


def test_continuous_batching_leaves_dtypes_weights_mode_and_attention_as_they_were(make_trainer, reward_adapter):
    trainer = make_trainer(reward_adapter=reward_adapter, gradient_checkpointing=True, **PAGED)
    trainer.args.bf16 = True  # on which TRL's own way casts the adapters
    before, trainable = everything(trainer), [p.requires_grad for p in trainer.model.parameters()]
    for mode in (True, False):
        trainer.model.train(mode)
        trainer._generate_single_turn(PROMPTS, None, {}, 1)
        assert {module.training for module in trainer.model.modules()} == {mode}
    after = everything(trainer)
    assert not moved(before, after) and {t.dtype for t in after.values()} == {torch.float32}
    assert [p.requires_grad for p in trainer.model.parameters()] == trainable
    assert trainer.model.active_adapters == [POLICY] and trainer.model.config._attn_implementation == "sdpa"


def test_each_prompt_gets_its_completion_cut_after_eos_or_at_the_limit(make_trainer):
    trainer = make_trainer(max_completion_length=12, **PAGED)
    completions, _ = trainer._generate_single_turn(PROMPTS * 4, None, {}, 1)
    assert len(completions) == 40
    ended = [c for c in completions if 1 in c]
    assert ended and all(c.index(1) == len(c) - 1 for c in ended)
    assert all(len(c) == 12 for c in completions if 1 not in c)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_come_from_the_distribution_that_the_trained_policy_is_scored_by(make_trainer, monkeypatch, temperature):
    """What transformers drew them with, against the policy's own log-probabilities, in one batch of mixed lengths."""
    trainer = make_trainer(temperature=temperature, **PAGED)
    trainer.train()
    drawn = {}
    told = backends.copy.copy(trainer.continuous_batching_config)
    told.return_logprobs = True
    manager = type(trainer.model.get_base_model()).init_continuous_batching

    def listening(self, *args, **kwargs):
        made = manager(self, *args, **kwargs)
        get = made.get_result

        def result(**kwargs):
            output = get(**kwargs)
            if output is not None:
                drawn[tuple(output.generated_tokens)] = output.logprobs
            return output

        made.get_result = result
        return made

    monkeypatch.setattr(type(trainer.model.get_base_model()), "init_continuous_batching", listening)
    answers = backends.continuous_batching(trainer.model, PROMPTS, trainer.generation_config, told, rows=4)
    completions = [answer.generated_tokens for answer in answers]
    rollout = trainer._rolled_out(PROMPTS, completions)
    for row, completion in enumerate(completions):
        by_sampler = torch.tensor(drawn[tuple(completion)])
        torch.testing.assert_close(by_sampler, rollout.logps[row, : len(completion)], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(rollout.logps, rollout.ref_logps)


def test_frequencies_of_first_tokens_are_those_of_the_policy(make_trainer):
    trainer = make_trainer(max_completion_length=1, top_k=3, **PAGED)
    completions, _ = trainer._generate_single_turn([[5, 6]] * 600, None, {}, 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    likely, tokens = logits.topk(3)
    seen = torch.bincount(torch.tensor([c[0] for c in completions]), minlength=len(logits)) / 600
    assert seen[tokens].sum() == 1, "top_k holds"
    torch.testing.assert_close(seen[tokens], likely.softmax(0), atol=0.07, rtol=0)


def test_as_many_sequences_at_once_as_rollout_batch_size_says(make_trainer):
    trainer = make_trainer(rollout_batch_size=3, **PAGED)
    widths = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda m, args, out: widths.append(out.size(1)))
    trainer._generate_single_turn(PROMPTS, None, {}, 1)
    assert max(widths) == 3
    assert sum(widths) >= 10


def test_a_cache_that_does_not_fit_is_made_for_half_as_many_sequences(make_trainer, caplog, monkeypatch):
    trainer = make_trainer(**PAGED)
    tried = []

    def fits_four(*args):
        tried.append(args[-1])
        if args[-1] > 4:
            raise MemoryError("Memory footprint 9 is more than available memory 8")
        return [SimpleNamespace(generated_tokens=[1])] * len(args[1])

    monkeypatch.setattr("rlhf_recipes.ppo.trainer.continuous_batching", fits_four)
    assert trainer._generate_single_turn(PROMPTS, None, {}, 1)[0] == [[1]] * 10
    assert tried == [10, 5, 2] and trainer._rollout_batch_size == 2
    assert "going on with 2 sequences at once" in caplog.text


def test_a_real_cache_beyond_the_memory_is_refused_by_transformers_with_a_memory_error(make_trainer):
    trainer = make_trainer(**PAGED)
    config = ContinuousBatchingConfig(page_size=16, num_blocks=10**9, max_memory_percent=0.5)
    with pytest.raises(MemoryError):
        backends.continuous_batching(trainer.model, PROMPTS, trainer.generation_config, config, 2)


def test_an_error_in_the_generating_thread_is_raised_and_not_swallowed(make_trainer):
    trainer = make_trainer(**PAGED)

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    trainer.roles.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(UserError, match="out of GPU memory with one sequence at a time"):
        trainer._generate_single_turn(PROMPTS[:2], None, {}, 1)


def test_an_interrupt_does_not_wait_for_the_batch(make_trainer, monkeypatch):
    trainer = make_trainer(max_completion_length=200, rollout_batch_size=1, **PAGED)
    steps = []
    trainer.roles.layers[0].register_forward_pre_hook(lambda *args: steps.append(args))

    def interrupted(*args, **kwargs):
        while not steps:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinuousBatchingManager, "get_result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer._generate_single_turn(PROMPTS, None, {}, 1)
    after = len(steps)
    time.sleep(0.2)
    assert len(steps) == after < 100  # of 2,000
    assert trainer.model.training


def test_a_run_by_continuous_batching_is_resumed_bit_for_bit_on_a_cpu(make_trainer, tiny_policy, tmp_path, prompts):
    settings = {
        "eval_dataset": prompts.select(range(8)), "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4,
        "save_strategy": "steps", "save_steps": 2, **PAGED,
    }  # fmt: skip
    unbroken = make_trainer(tiny_policy(), output_dir=str(tmp_path / "a"), **settings)
    unbroken.train()
    resumed = make_trainer(tiny_policy(), output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert not moved(weights(unbroken, POLICY, VALUE), weights(resumed, POLICY, VALUE))
    assert history(resumed, "reward") == history(unbroken, "reward")
    assert history(unbroken, "kl")[0] == 0 and history(unbroken, "ratio")[0] == 1
    assert unbroken.self_test["sampler"] < 1e-5  # by the log-probabilities of continuous batching itself
    assert len(history(unbroken, "eval_objective")) == 2


# ---- refusals


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["rollouts=vllm"], r"no such choice\. .* vLLM cannot be installed beside the tested versions: docs/ppo.md"),
        (["training.use_vllm=true"], "vLLM cannot be installed beside the tested versions .*continuous_batching"),
        (["rollouts=continuous_batching", "model.attn_implementation=flex_attention"], "needs sdpa, eager or flash"),
        (["rollouts=cuda"], "did you mean rollouts=cuda_graphs"),
    ],
)
def test_rollouts_that_cannot_work_are_refused_by_the_command_line(overrides, fault):
    with pytest.raises(UserError, match=fault):
        compose("ppo", overrides)


@pytest.mark.parametrize(
    ("kwargs", "fault"),
    [
        ({"use_vllm": True}, "vLLM cannot be installed"),
        ({**PAGED, "cuda_graphs": True}, "cuda_graphs and use_transformers_continuous_batching exclude each other"),
        pytest.param(
            {"cuda_graphs": True},
            "needs a CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ({**PAGED, "repetition_penalty": 1.1}, "repetition_penalty is left out by continuous batching"),
    ],
)
def test_rollouts_that_cannot_work_are_refused_by_the_config(kwargs, fault):
    with pytest.raises(ValueError, match=fault):
        PPOConfig("out", bf16=False, use_cpu=True, **kwargs)


def test_the_group_belongs_to_ppo_alone_and_its_default_changes_nothing():
    assert compose("ppo") == compose("ppo", ["rollouts=generate"])
    assert compose("ppo", ["rollouts=continuous_batching"]).training.use_transformers_continuous_batching
    with pytest.raises(UserError, match="rollouts"):
        compose("sft", ["rollouts=generate"])
