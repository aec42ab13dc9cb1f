"""Policies side by side: figures with their intervals, samples, KL and rewards, each against a computation by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_recipes import data, evaluation, portions
from rlhf_recipes.config import compose
from rlhf_recipes.evaluation import Interval, Sample, interval, kl, rate, rewards, sample, summarize
from rlhf_recipes.rewards import Rewards
from rlhf_recipes.roles import POLICY, REFERENCE, REWARD, Roles

PROMPTS = [{"prompt": "w1 w2"}, {"prompt": "w3 w4 w5 w6 w7"}, {"prompt": "w8"}, {"prompt": "w9 w10 w11"}]
PAD, EOS = 0, 1


@pytest.fixture
def roles(tiny_policy):
    """Policy and reference apart, with a reward adapter and its head."""
    roles = Roles(tiny_policy().eval(), trunk=0)
    for adapter in (REFERENCE, REWARD):
        roles.add_copy(adapter, POLICY)
    torch.manual_seed(1)
    roles.add_head(REWARD, torch.randn(1, 32), mean=0.5, std=2.0)
    for adapter in (POLICY, REWARD):
        for parameter in roles.parameters(adapter).values():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return roles


def draw(roles, tokenizer, prompts=PROMPTS, samples=2, seed=2, **options):
    options = {"max_new_tokens": 12, "batch_size": 3} | options
    return sample(roles.model, tokenizer, prompts, samples=samples, seed=seed, **options)


# ---- intervals


def test_an_interval_is_the_mean_and_students_t_standard_errors():
    # mean 3, squares of the deviations 4 + 0 + 4 = 8, variance 8 / 2 = 4, standard error 2 / sqrt(3), t of 2 degrees
    assert interval([1, 3, 5]) == pytest.approx((3, 4.302653 * 2 / math.sqrt(3)))


def test_one_value_has_no_interval():
    mean, half_width = interval([0.25])
    assert mean == 0.25 and math.isnan(half_width)


def test_a_rate_of_all_or_nothing_has_an_interval_too():
    """Of eight prompts that all end, .90 may be the truth: Wilson reaches down to .68."""
    figures = summarize({"EOS": [1.0] * 8, "length": [3.0] * 8}, samples=1)
    assert figures["EOS"] == pytest.approx((1, 1 - 0.6756), abs=1e-4)
    assert figures["length"] == (3, 0)


def test_differences_of_rates_are_no_rates():
    change = summarize({"EOS": [-0.5, 0.5, 0.0]}, samples=1, rates=())
    assert change["EOS"] == interval([-0.5, 0.5, 0.0])


def test_an_interval_of_normal_values_covers_in_95_of_100_cases_however_few():
    values = np.random.default_rng(0).normal(size=(2000, 4))
    covered = sum(abs(mean) <= half for mean, half in map(interval, values.tolist()))
    assert 0.935 <= covered / 2000 <= 0.965


def test_prompts_are_counted_and_not_samples():
    figures = summarize({"length": [1, 3, 6, 8]}, samples=2)
    # prompts: 2 and 7; standard deviation 5 / sqrt(2), standard error 2.5. As four values it would be 1.55
    assert figures == {"length": pytest.approx(Interval(4.5, 12.706205 * 2.5))}


def test_more_samples_of_the_same_answers_make_the_interval_no_narrower():
    one = summarize({"length": [1.0, 2.0, 5.0]}, samples=1)
    four = summarize({"length": [v for v in (1.0, 2.0, 5.0) for _ in range(4)]}, samples=4)
    assert four == one


def test_what_does_not_apply_to_a_prompt_is_left_out_and_a_prompt_of_part_counts_as_its_mean():
    figures = summarize({"helpful": [1, 0, None, None, None, 1]}, samples=2)
    # prompts: 1/2, none, 1
    assert figures["helpful"] == rate([0.5, 1]).around_mean() and figures["helpful"].mean == 0.75


def test_a_measure_that_applies_to_no_prompt_is_not_shown():
    assert summarize({"honest": [None, None], "length": [1.0, 2.0]}, samples=1).keys() == {"length"}


def test_gold_is_the_mean_of_its_components_however_many_prompts_each_has():
    helpful = [1, 1, 1, 0] + [None] * 4  # mean 3/4; Wilson from .301 to .954
    harmless = [None] * 4 + [0, 0, None, None]  # mean 0; Wilson from 0 to .658
    figures = summarize({"helpful": helpful, "harmless": harmless, "length": [2.0] * 8}, samples=1)
    assert list(figures) == ["gold", "helpful", "harmless", "length"]
    # (3/4 + 0) / 2, where the mean of the 6 values would be 1/2; the errors are independent
    assert figures["gold"] == pytest.approx((0.375, math.hypot(0.75 - 0.3006, 0.6576) / 2), abs=1e-4)


def test_without_a_known_truth_there_is_no_gold():
    assert "gold" not in summarize({"reward": [1.0, 2.0]}, samples=1)


# ---- what was selected on


def test_a_kept_checkpoint_is_the_best_of_the_looks_after_the_first_step():
    """The objective was measured at steps 0, 2 and 4; step 0 has no checkpoint, and what trains is no look."""
    log = [{"step": at, "eval_objective": 0.1, "eval_reward": 1.0} for at in (0, 2, 4)] + [
        {"step": 4, "objective": 0.2}
    ]
    for best, metric, wanted in (
        (True, "objective", {"kept": "best of 2 looks"}),
        (True, "eval_objective", {"kept": "best of 2 looks"}),
        (False, "objective", {}),
    ):
        args = SimpleNamespace(load_best_model_at_end=best, metric_for_best_model=metric)
        assert evaluation.kept(SimpleNamespace(args=args, state=SimpleNamespace(log_history=log))) == wanted


# ---- samples


def test_equal_seeds_give_equal_samples_whatever_the_random_state_outside(roles, tokenizer):
    torch.manual_seed(1)
    one = draw(roles, tokenizer)
    torch.manual_seed(2)
    assert draw(roles, tokenizer) == one
    assert draw(roles, tokenizer, seed=1) != one


def test_a_row_has_the_same_noise_whatever_the_batch_size_and_whatever_is_asked_beside_it(roles, tokenizer):
    """Token by token: in later batches too, and after another row has ended sooner or later."""
    one = draw(roles, tokenizer, samples=3, batch_size=2)
    assert draw(roles, tokenizer, samples=3, batch_size=12) == draw(roles, tokenizer, samples=3, batch_size=5) == one
    others = [{"prompt": "w20 w21"}, *PROMPTS[1:]]
    again = draw(roles, tokenizer, others, samples=3, batch_size=2)
    assert again[3:] == one[3:] and again[:3] != one[:3]
    assert draw(roles, tokenizer, samples=2, batch_size=2)[2:4] == one[3:5]  # nor does it hang on their number


def test_the_models_own_generation_config_changes_no_sample_and_is_left_as_it_was(roles, tokenizer):
    """Penalties, cuts and bans that instruct models are shipped with would draw from another distribution."""
    from transformers import GenerationConfig

    wanted, base = draw(roles, tokenizer), roles.model.get_base_model()
    options = {"repetition_penalty": 5.0, "min_p": 0.9, "top_k": 2, "temperature": 0.1, "suppress_tokens": [5, 6]}
    options |= {"no_repeat_ngram_size": 1, "min_new_tokens": 12, "num_beams": 2, "max_length": 4, "do_sample": True}
    own = base.generation_config = GenerationConfig(eos_token_id=EOS, **options)
    assert draw(roles, tokenizer) == wanted
    assert base.generation_config is own and own.repetition_penalty == 5.0


def test_the_random_state_outside_is_left_alone(roles, tokenizer):
    before = torch.get_rng_state()
    draw(roles, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_come_prompt_by_prompt_and_differ(roles, tokenizer):
    made = draw(roles, tokenizer, samples=3)
    assert [s.prompt for s in made] == [row["prompt"] for row in PROMPTS for _ in range(3)]
    assert [s.prompt_ids for s in made] == [tokenizer(s.prompt)["input_ids"] for s in made]
    assert len({tuple(s.completion_ids) for s in made[:3]}) == 3
    assert [s.completion for s in made] == [tokenizer.decode(s.completion_ids, skip_special_tokens=True) for s in made]


def test_a_sample_ends_at_the_first_of_all_the_eos_tokens_that_the_model_declares(roles, tokenizer):
    roles.model.get_base_model().generation_config.eos_token_id = [EOS, 20, 30]
    made = draw(roles, tokenizer, samples=40)
    endings = {EOS, 20, 30}
    ended = [s for s in made if s.completion_ids[-1] in endings]
    assert {s.completion_ids[-1] for s in ended} == endings
    assert all(not endings & {*s.completion_ids[:-1]} for s in made)
    assert all(len(s.completion_ids) == 12 for s in made if s not in ended)


def test_a_sample_ends_at_the_tokenizers_eos_where_the_model_declares_none(roles, tokenizer):
    roles.model.get_base_model().generation_config.eos_token_id = None
    made = draw(roles, tokenizer, samples=20)
    assert any(s.completion_ids[-1] == EOS for s in made)
    assert not any(EOS in s.completion_ids[:-1] for s in made)


def test_samples_follow_the_distribution_of_the_model(roles, tokenizer):
    """First tokens against the softmax, in total variation: temperature 1, nothing cut."""
    made = draw(roles, tokenizer, PROMPTS[:1], samples=4000, max_new_tokens=1, batch_size=4000)
    counted = torch.bincount(torch.tensor([s.completion_ids[0] for s in made]), minlength=43) / 4000
    logits = roles.model(input_ids=torch.tensor([made[0].prompt_ids])).logits[0, -1]
    # expected for 43 tokens: at most half of the sum of sqrt(2 / pi * p / n), about .04
    assert (counted - logits.softmax(-1)).abs().sum() / 2 < 0.06
    assert (counted - (logits / 2).softmax(-1)).abs().sum() / 2 > 0.1


def test_the_active_adapter_is_the_one_that_is_sampled(roles, tokenizer):
    of_policy = draw(roles, tokenizer)
    with roles.active(REFERENCE):
        of_reference = draw(roles, tokenizer)
    with roles.active(None):
        of_base = draw(roles, tokenizer)
    assert of_policy != of_reference != of_base != of_policy
    for name, parameter in roles.parameters(POLICY).items():
        parameter.data.copy_(roles.parameters(REFERENCE)[name])
    assert draw(roles, tokenizer) == of_reference
    for name, parameter in roles.parameters(POLICY).items():
        if "lora_B" in name:
            parameter.data.zero_()
    assert draw(roles, tokenizer) == of_base


# ---- KL and rewards


def distribution(roles, adapter, ids):
    with torch.no_grad(), roles.active(adapter):
        return roles.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_the_expected_kl_over_all_completions_of_one_token_is_the_exact_kl(roles, tokenizer):
    for prompt in PROMPTS[:2]:
        prompt_ids = tokenizer(prompt["prompt"])["input_ids"]
        made = [Sample("", "", prompt_ids, [token]) for token in range(43)]
        estimates = torch.tensor(kl(roles, tokenizer, made, 10, policy=POLICY, reference=REFERENCE)).double()
        p, q = (distribution(roles, adapter, prompt_ids)[-1] for adapter in (POLICY, REFERENCE))
        exact = (p.exp() * (p - q)).sum()
        assert exact > 0.01
        assert (p.exp() * estimates).sum() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize(("policy", "reference"), [(POLICY, REFERENCE), (REFERENCE, POLICY), (None, POLICY)])
def test_the_kl_of_a_completion_is_that_of_the_unpadded_row(roles, tokenizer, policy, reference):
    with roles.active(policy):
        made = draw(roles, tokenizer)
    assert len({len(s.completion_ids) for s in made}) > 1
    wanted = []
    for s in made:
        ids, n = [*s.prompt_ids, *s.completion_ids], len(s.prompt_ids)
        p, q = (distribution(roles, a, ids)[n - 1 : -1] for a in (policy, reference))
        wanted.append((p.exp() * (p - q)).sum().item())
    assert max(wanted) > 0.01
    assert kl(roles, tokenizer, made, 3, policy=policy, reference=reference) == pytest.approx(
        wanted, rel=1e-3, abs=1e-5
    )


def test_the_kl_of_a_policy_to_itself_is_zero(roles, tokenizer):
    assert kl(roles, tokenizer, draw(roles, tokenizer), 3, policy=POLICY, reference=POLICY) == [0.0] * 8


def test_rewards_are_the_scores_of_the_unpadded_rows(roles, tokenizer):
    made = draw(roles, tokenizer)
    assert len({len(s.prompt_ids) for s in made}) == 4 and len({len(s.completion_ids) for s in made}) > 1
    wanted = []
    for s in made:
        with torch.no_grad(), roles.active(REWARD):
            ids = torch.tensor([[*s.prompt_ids, *s.completion_ids]])
            hidden = roles.model.get_base_model().model(input_ids=ids).last_hidden_state[0, -1]
            wanted.append(roles.heads[REWARD](hidden).item())
    assert rewards(roles, tokenizer, made, 3) == pytest.approx(wanted, rel=1e-4)
    assert roles.model.active_adapter == POLICY


def test_what_goes_through_at_once_changes_no_figure(roles, tokenizer, monkeypatch):
    """Samples whose prompts are read by chunks, and KL and rewards row by row."""
    made = draw(roles, tokenizer, batch_size=4)
    wanted = kl(roles, tokenizer, made, 8, policy=POLICY, reference=REFERENCE), rewards(roles, tokenizer, made, 8)
    rows = []
    watched = roles.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setitem(portions.TOKENS, "cpu", 8)
    assert draw(roles, tokenizer, batch_size=4) == made and max(tokens for _, tokens in rows) == 2
    rows.clear()
    monkeypatch.setitem(portions.TOKENS, "cpu", 6)
    again = kl(roles, tokenizer, made, 8, policy=POLICY, reference=REFERENCE), rewards(roles, tokenizer, made, 8)
    assert {n for n, _ in rows} == {1}
    rows.clear()
    monkeypatch.setattr(portions, "LOGITS", 1)
    monkeypatch.setitem(portions.TOKENS, "cpu", 1024)
    kl(roles, tokenizer, made, 8, policy=POLICY, reference=REFERENCE)
    watched.remove()
    assert {n for n, _ in rows} == {1}
    for one, other in zip(wanted, again, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


# ---- before and after, on the embedded world


@pytest.fixture
def embedded():
    from datasets import Dataset

    from rlhf_recipes import models

    def make(*overrides):
        cfg = compose(
            "ppo", ["evaluation.prompts=24", "evaluation.samples=2", "evaluation.max_new_tokens=8", *overrides]
        )
        tokenizer = models.load_tokenizer(cfg.model, Dataset.from_dict({"prompt": ["a"]}))
        roles = models.thaw(models.load_policy(cfg, None), trunk=0)
        torch.manual_seed(0)
        for parameter in roles.parameters(POLICY).values():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        return cfg, roles, tokenizer

    return make


def test_policies_are_compared_on_the_same_prompts_with_the_same_noise(embedded):
    cfg, roles, tokenizer = embedded()
    found = evaluation.changes(
        cfg, data.heldout_prompts(cfg), roles, tokenizer, {"base": None, "sft": POLICY, "again": POLICY}
    )
    assert [*found.figures] == ["base", "sft", "again", "change"]
    assert found.figures["again"] == found.figures["sft"]
    assert found.figures["sft"]["KL to SFT"] == (0, 0)
    assert found.figures["base"]["KL to SFT"].mean > 0.1
    assert {"gold", "length", "EOS"} <= found.figures["sft"].keys() and "reward" not in found.figures["sft"]
    assert [row["prompt"] for row in found.samples] == [row["prompt"] for row in data.heldout_prompts(cfg)]
    assert all(row["sft"] == row["again"] for row in found.samples)
    assert any(row["sft"] != row["base"] for row in found.samples)


def test_the_change_is_measured_prompt_by_prompt(embedded):
    """Its interval is that of the differences, which is 0 between equal policies however prompts differ."""
    cfg, roles, tokenizer = embedded()
    same = evaluation.changes(
        cfg, data.heldout_prompts(cfg), roles, tokenizer, {"sft": POLICY, "again": POLICY}
    ).figures
    assert same["sft"]["length"].half_width > 0
    assert same["change"]["length"] == same["change"]["KL to SFT"] == (0, 0)
    found = evaluation.changes(cfg, data.heldout_prompts(cfg), roles, tokenizer, {"base": None, "sft": POLICY}).figures
    for measure in ("length", "EOS", "helpful", "gold"):
        wanted = found["sft"][measure].mean - found["base"][measure].mean
        assert found["change"][measure].mean == pytest.approx(wanted, abs=1e-9)


def test_what_ppo_optimised_is_shown_with_its_parts_and_the_samples_carry_their_scores(embedded):
    """A reward function of TRL's signature, with a column of the prompts; and one that fails costs its column alone."""
    cfg, roles, tokenizer = embedded()
    asked = data.heldout_prompts(cfg)
    asked = asked.add_column("wanted", [float(i % 2) for i in range(len(asked))])

    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    def column(completions, wanted, **kwargs):
        return [None if w else 2.0 for w in wanted]

    def compared(*functions, weights):
        names = [f.__name__ for f in functions]
        reward = Rewards(functions=[*functions], weights=weights, names=names)
        return evaluation.changes(cfg, asked, roles, tokenizer, {"base": None, "sft": POLICY}, reward)

    alone = compared(length, weights=[1.0])
    assert alone.figures["sft"]["reward"] == alone.figures["sft"]["length"]
    assert alone.figures["change"]["reward"] == alone.figures["change"]["length"]
    assert not [name for name in alone.figures["sft"] if name.startswith("rewards/")]
    found = compared(length, column, weights=[2.0, 3.0])
    assert found.figures["sft"]["rewards/column"] == (2, 0)
    for number, row in enumerate(found.samples):
        tokens = len(tokenizer(row["sft"])["input_ids"])
        assert row["scores"]["sft"]["reward"] in [2.0 * (tokens + eos) + 6.0 * (number % 2 == 0) for eos in (0, 1)]
        assert row["scores"].keys() == {"base", "sft"} and row["scores"]["sft"]["gold"] in (0, 0.5, 1)
    broken = compared(lambda completions, **kwargs: 1 / 0, weights=[1.0])
    assert "reward" not in broken.figures["sft"] and "length" in broken.figures["sft"]


def test_the_figures_are_those_of_the_samples(embedded):
    from rlhf_recipes import world

    cfg, roles, tokenizer = embedded()
    figures = evaluation.changes(cfg, data.heldout_prompts(cfg), roles, tokenizer, {"sft": POLICY}).figures["sft"]
    made = sample(
        roles.model, tokenizer, data.heldout_prompts(cfg), samples=2, max_new_tokens=8, batch_size=256, seed=cfg.seed
    )
    lengths = [len(s.completion_ids) for s in made]
    assert figures["length"].mean == pytest.approx(sum(lengths) / 48)
    assert figures["EOS"].mean == pytest.approx(sum(s.completion_ids[-1] == EOS for s in made) / 48)
    verdicts = [world.gold(s.prompt, s.completion).helpful for s in made]
    helpful = [v for v in verdicts if v is not None]
    assert figures["helpful"].mean == pytest.approx(sum(helpful) / len(helpful))


def test_the_share_that_ends_counts_every_eos_that_ends_a_sample(embedded):
    """Chat models declare two or three: a completion that ends in any of them was not cut."""
    cfg, roles, tokenizer = embedded()
    roles.model.get_base_model().generation_config.eos_token_id = [EOS, *range(2, 333)]
    figures = evaluation.changes(cfg, data.heldout_prompts(cfg), roles, tokenizer, {"sft": POLICY}).figures["sft"]
    assert figures["length"].mean == 1
    assert figures["EOS"].mean == 1


def test_held_out_prompts_are_the_same_in_every_stage_and_none_is_trained_on():
    asked = {
        recipe: list(data.heldout_prompts(compose(recipe, ["evaluation.prompts=50"])))
        for recipe in ("sft", "rm", "ppo")
    }
    assert len(asked["ppo"]) == 50
    assert asked["sft"] == asked["rm"] == asked["ppo"]
    cfg = compose("ppo")
    prompts = {row["prompt"] for row in asked["ppo"]}
    assert len(prompts) == 50
    assert not prompts & {*data.load(cfg.data, "prompts", cfg.seed).train["prompt"]}


def test_no_prompts_to_answer_is_no_comparison(embedded):
    cfg, roles, tokenizer = embedded("evaluation.prompts=0", "training.eval_strategy=no")
    assert evaluation.changes(cfg, data.heldout_prompts(cfg), roles, tokenizer, {"sft": POLICY}) == evaluation.Changes(
        {}, []
    )
