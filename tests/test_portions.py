"""How much goes through the model at once where nothing is trained."""

import pytest

from rlhf_recipes.portions import prefill_chunk, rows_at_once, tokens_at_once


def test_short_prompts_are_read_at_once_and_long_ones_by_chunks() -> None:
    assert prefill_chunk(16, 64, "cpu") is None
    assert prefill_chunk(16, 65, "cpu") == 64
    assert prefill_chunk(5000, 10, "cpu") == 1, "one token each is the least"
    assert prefill_chunk(16, 512, "cuda") == 128


@pytest.mark.parametrize(
    ("most", "tokens", "logits", "rows"),
    [(16, 10, 1, 16), (16, 128, 1, 8), (16, 5000, 1, 1), (16, 10, 2**24, 4), (16, 10, 2**30, 1), (16, 10, 0, 16)],
)
def test_rows_that_go_through_together_are_bounded_by_their_tokens_and_logits(
    most: int, tokens: int, logits: int, rows: int
) -> None:
    assert rows_at_once(most, tokens, "cpu", logits) == rows


def test_another_device_is_taken_for_a_gpu() -> None:
    assert tokens_at_once("xpu") == tokens_at_once("cuda") > tokens_at_once("cpu")
