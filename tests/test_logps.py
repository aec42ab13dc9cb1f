"""Log-probabilities, entropies and gradients of `TokenLogps` against torch's log_softmax and its autograd."""

import pytest
import torch

from rlhf_recipes.logps import TokenLogps

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture
def made():
    torch.manual_seed(0)
    return 5 * torch.randn(3, 4, 11), torch.randint(11, (3, 4)), torch.randn(3, 4)


@DTYPES
def test_they_are_those_of_log_softmax_in_float32(made, dtype):
    logits, tokens, _ = made
    logits = logits.to(dtype).requires_grad_()
    logps, entropies = TokenLogps.apply(logits, tokens)
    wanted = logits.detach().float().log_softmax(-1)
    assert logps.dtype == entropies.dtype == torch.float32
    torch.testing.assert_close(logps.detach(), wanted.gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=wanted).entropy())
    assert not entropies.requires_grad


@DTYPES
def test_gradients_are_those_of_autograd_rounded_to_the_logits_own_type(made, dtype):
    logits, tokens, weights = made
    logits = logits.to(dtype).requires_grad_()
    oracle = logits.detach().double().requires_grad_()
    (oracle.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * weights).sum().backward()
    (TokenLogps.apply(logits, tokens)[0] * weights).sum().backward()
    torch.testing.assert_close(logits.grad, oracle.grad.to(dtype))


def test_scores_equal_those_of_training_to_the_last_bit_and_have_no_entropies(made):
    logits, tokens, _ = made
    with torch.no_grad():
        scored, entropies = TokenLogps.apply(logits, tokens)
    assert entropies is None
    assert torch.equal(scored, TokenLogps.apply(logits.clone().requires_grad_(), tokens)[0].detach())


def test_the_gradient_takes_the_place_of_the_logits(made):
    logits, tokens, weights = made
    leaf = logits.requires_grad_()
    held = leaf * 1
    given = []
    held.register_hook(given.append)
    (TokenLogps.apply(held, tokens)[0] * weights).sum().backward()
    assert given[0].data_ptr() == held.data_ptr()


def test_a_masked_token_of_no_probability_has_a_finite_gradient(made):
    logits, tokens, _ = made
    logits = logits.masked_fill(torch.arange(11) == 0, -torch.inf).requires_grad_()
    tokens = tokens.clamp(min=1)
    TokenLogps.apply(logits, tokens)[0].sum().backward()
    assert logits.grad.isfinite().all()
