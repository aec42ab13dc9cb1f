"""Several reward models as one: what their scores come to, against numpy, and as roles on one base."""

import numpy as np
import pytest
import torch

from rlhf_recipes import evaluation
from rlhf_recipes.ensembles import ENSEMBLES, Ensemble
from rlhf_recipes.errors import UserError
from rlhf_recipes.evaluation import Sample
from rlhf_recipes.roles import GUARD, POLICY, REWARD, Roles, member

SCORES = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)  # of three members, for 50 episodes
ORACLES = {
    "mean": lambda s: s.mean(0),
    "worst": lambda s: s.min(0),
    "mean_minus_std": lambda s: s.mean(0) - 0.7 * np.sqrt(((s - s.mean(0)) ** 2).mean(0)),
}


@pytest.mark.parametrize("how", ENSEMBLES)
def test_scores_are_combined_as_numpy_combines_them(how):
    found = Ensemble(how, 0.7).combine(torch.tensor(SCORES))
    assert found.numpy() == pytest.approx(ORACLES[how](SCORES), abs=1e-6)


@pytest.mark.parametrize("how", ENSEMBLES)
def test_one_member_is_itself_to_the_last_bit(how):
    one = torch.tensor(SCORES[:1])
    assert torch.equal(Ensemble(how).combine(one), one[0])


def test_no_member_is_worth_more_than_another_and_caution_never_pays_more_than_the_mean():
    scores = torch.tensor(SCORES)
    for how in ENSEMBLES:
        assert torch.allclose(Ensemble(how).combine(scores), Ensemble(how).combine(scores.flip(0)), atol=1e-6)
    mean = Ensemble("mean").combine(scores)
    for cautious in (Ensemble("worst"), Ensemble("mean_minus_std")):
        assert (cautious.combine(scores) <= mean).all()


# ---- on one base


@pytest.fixture
def reward_models(make_reward_adapter):
    """A function that gives the folders of reward models of some seeds, equal to the policy in the lower layers."""
    return lambda *seeds: [make_reward_adapter(seed) for seed in seeds]


SAMPLES = [Sample("", "", [3, 4, 5], [6, 7, 8]), Sample("", "", [9, 10], [3, 4, 5, 6])]


def scores(roles, tokenizer, role=REWARD):
    return np.array(evaluation.rewards(roles, tokenizer, SAMPLES, 8, role))


def test_members_score_as_each_alone_and_are_combined(tiny_policy, reward_models, tokenizer):
    folders = reward_models(5, 6, 7)
    alone = []
    for folder in folders:
        roles = Roles(tiny_policy(), trunk=0.5)
        roles.hold(REWARD, [folder])
        alone.append(scores(roles, tokenizer))
    together = Roles(tiny_policy(), trunk=0.5)
    together.hold(REWARD, folders, Ensemble("worst"))
    assert together.members(REWARD) == ["reward", "reward_1", "reward_2"]
    each = [scores(together, tokenizer, name) for name in ("reward_1", "reward_2")]
    assert np.array_equal(each, alone[1:])
    assert np.array_equal(scores(together, tokenizer), np.min(alone, axis=0))


def test_the_trunk_is_shared_with_all_members_in_one_storage(tiny_policy, reward_models):
    roles = Roles(tiny_policy(), trunk=0.5)
    roles.hold(REWARD, reward_models(5, 6))
    assert roles.find_trunk() == 2
    for name, tensor in roles.layer_parameters(POLICY, roles.layers[:2]).items():
        for adapter in roles.members(REWARD):
            assert roles.parameters(adapter)[name].data_ptr() == tensor.data_ptr()


def test_a_role_held_beside_a_training_policy_is_frozen_and_shares_the_trunk(tiny_policy, reward_models):
    roles = Roles(tiny_policy(), trunk=0.5)
    roles.train(POLICY)
    trained = {name for name, p in roles.model.named_parameters() if p.requires_grad}
    roles.hold(GUARD, reward_models(5, 6))
    roles.share_trunk(GUARD)
    assert {name for name, p in roles.model.named_parameters() if p.requires_grad} == trained
    lower, upper = roles.layers[:2], roles.layers[2:]
    for adapter in (member(GUARD, 0), member(GUARD, 1)):
        policy, own = (roles.layer_parameters(a, lower) for a in (POLICY, adapter))
        assert all(own[name].data_ptr() == tensor.data_ptr() for name, tensor in policy.items())
        policy, own = (roles.layer_parameters(a, upper) for a in (POLICY, adapter))
        assert not {p.data_ptr() for p in own.values()} & {p.data_ptr() for p in policy.values()}


def test_a_member_of_another_rank_scores_by_its_own(tiny_llama, tiny_policy, reward_models, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    other = Roles(get_peft_model(tiny_llama(), config), trunk=0.5)
    other.add_head(POLICY, torch.ones(1, 32))
    other.save_scalar(POLICY, tmp_path / "rank2")
    roles = Roles(tiny_policy(), trunk=0.5)
    roles.hold(REWARD, [*reward_models(5), tmp_path / "rank2"])
    ids = torch.tensor([[5, 6, 7]])
    with roles.active("reward_1"):
        scored = roles.scores(ids, torch.ones_like(ids), 0, "reward_1")
    torch.testing.assert_close(scored, other.scores(ids, torch.ones_like(ids), 0, POLICY))


def test_a_member_without_a_head_is_refused_by_name(tiny_policy, reward_models, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=rf"{tmp_path / 'policy'} has no scalar head"):
        Roles(tiny_policy(), trunk=0.5).hold(REWARD, [*reward_models(5), tmp_path / "policy"])
