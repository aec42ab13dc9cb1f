"""The arithmetic of PPO, against numbers worked out by hand or by the definition."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rlhf_recipes.ppo.advantages import (
    KLController,
    ReturnScale,
    clipped_value_loss,
    explained_variance,
    gae,
    last_token,
    masked_moments,
    token_rewards,
    whiten,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_the_score_is_paid_at_the_last_token_and_the_kl_where_it_arises():
    logps, ref_logps = (
        torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0]]),
        torch.tensor([[-1.1, -2.2, -3.3], [-1.5, 0.0, 0.0]]),
    )
    rewards = token_rewards(torch.tensor([1.0, -1.0]), logps, ref_logps, MASK, kl_coef=2.0)
    torch.testing.assert_close(rewards, torch.tensor([[-0.2, -0.4, 0.4], [-2.0, 0.0, 0.0]]))


def test_last_token_is_the_last_one_of_the_mask():
    assert last_token(MASK).tolist() == [2, 0]


def test_gae_equals_the_sum_it_is_defined_by():
    torch.manual_seed(0)
    rewards, values = torch.randn(1, 5), torch.randn(1, 5)
    gamma, lam = 0.9, 0.8
    following = torch.cat([values[0, 1:], torch.zeros(1)])
    delta = rewards[0] + gamma * following - values[0]
    by_definition = torch.stack([sum((gamma * lam) ** k * delta[i + k] for k in range(5 - i)) for i in range(5)])
    mask = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam)[0], by_definition)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rewards = torch.tensor([[0.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, 1.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0), torch.tensor([[1.5, 1.0, 0.5]]))


def test_padding_neither_gives_nor_receives_advantage():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [3.0, 7.0, 7.0]])
    values = torch.full((2, 3), 0.5)
    advantages = gae(rewards, values, MASK, 1.0, 1.0)
    torch.testing.assert_close(advantages, torch.tensor([[0.5, 0.5, 0.5], [2.5, 0.0, 0.0]]))


def test_moments_are_those_of_the_masked_elements():
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]])
    mean, variance = masked_moments(x, MASK)
    assert (mean.item(), variance.item()) == (3.0, 3.5)  # of 1, 2, 3, 6


def test_whitening_gives_mean_zero_and_variance_one_and_can_keep_the_mean():
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 99.0, 99.0]])
    whitened = whiten(x, MASK)
    torch.testing.assert_close(masked_moments(whitened, MASK), (torch.tensor(0.0), torch.tensor(1.0)))
    assert whitened[1, 1:].tolist() == [0, 0]
    kept = whiten(x, MASK, shift_mean=False)
    assert masked_moments(kept, MASK)[0].item() == pytest.approx(3.0)


def test_whitening_over_two_processes_equals_whitening_the_whole():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 3), torch.rand(4, 3) > 0.3
    meet, sent = threading.Barrier(2), [None, None]

    def process(rank):
        def reduce(tensor):
            sent[rank] = tensor
            meet.wait()
            total = sent[0] + sent[1]
            meet.wait()
            return total

        rows = slice(2 * rank, 2 * rank + 2)
        return whiten(x[rows], mask[rows], reduce)

    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(torch.cat(list(pool.map(process, (0, 1)))), whiten(x, mask))


def test_the_penalty_of_the_reward_has_the_gradient_of_the_kl():
    """Over all tokens of a distribution: with the other estimators its expected policy gradient is another one."""
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    reference = torch.tensor([0.5, 0.3, 0.2]).log()
    logps = logits.log_softmax(-1)
    (true,) = torch.autograd.grad((logps.exp() * (logps - reference)).sum(), logits, retain_graph=True)
    mask = torch.ones(3, 1, dtype=torch.bool)
    penalty = -token_rewards(torch.zeros(3), logps.detach()[:, None], reference[:, None], mask, kl_coef=1.0)[:, 0]
    (taken,) = torch.autograd.grad((logps.exp().detach() * penalty * logps).sum(), logits)
    torch.testing.assert_close(taken, true)


def test_the_return_scale_is_that_of_the_first_batch_and_follows_slowly():
    scale = ReturnScale()
    scale.update(10.0, 4.0)
    assert (scale.mean, scale.std) == (10.0, 2.0)
    assert scale.normalized(torch.tensor(14.0)) == 2 and scale.restored(torch.tensor(2.0)) == 14
    scale.update(12.0, 4.0)  # half and half: mean 11, and the means' own variance of 1 more
    assert scale.mean == 11 and scale.variance == pytest.approx(5.0)
    constant = ReturnScale()
    constant.update(3.0, 0.0)
    assert (constant.mean, constant.std) == (3.0, 1.0)


def test_explained_variance_of_a_perfect_a_constant_and_a_harmful_critic():
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.zeros(1, 3), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)  # errors 2r: 1 - 4
    assert math.isnan(explained_variance(torch.zeros(1, 3), torch.full((1, 3), 0.1), mask))  # nothing to explain


def test_value_loss_takes_the_worse_of_plain_and_clipped():
    values, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])
    # clipped to 0.2: errors 0.8 and 1.8, against plain errors 0 and 1
    torch.testing.assert_close(clipped_value_loss(values, old, returns, 0.2), torch.tensor([0.32, 1.62]))
    torch.testing.assert_close(clipped_value_loss(values, old, returns, None), torch.tensor([0.0, 0.5]))


def test_the_kl_coefficient_moves_towards_its_target_by_at_most_a_fifth_of_an_error():
    controller = KLController(coef=0.1, target=2.0, horizon=1000)
    controller.update(kl=200.0, episodes=100)  # error clipped to 0.2: 0.1 * (1 + 0.2 * 0.1)
    assert controller.coef == pytest.approx(0.102)
    controller.update(kl=2.0, episodes=100)
    assert controller.coef == pytest.approx(0.102)
    fixed = KLController(coef=0.1, target=None, horizon=1000)
    fixed.update(kl=200.0, episodes=100)
    assert fixed.coef == 0.1
