"""Figures for people: intervals, durations, tables."""

import math

import pytest

from rlhf_recipes.figures import duration, number, table


def test_a_table_is_aligned_and_shows_intervals_and_gaps():
    rows = [{"": "sft", "gold": (0.671, 0.018), "KL": None}, {"": "ppo", "gold": (0.853, 0.012), "KL": 12.3456}]
    assert table(rows, ["", "gold", "KL", "length"]).splitlines() == [
        "            gold    KL  length",
        "sft  0.67 ± 0.02     -       -",
        "ppo  0.85 ± 0.01  12.3       -",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[((0.7149, 0.0213), "0.71 ± 0.02"), ((0.5, 0.0), "0.50 ± 0.00"), ((0.5, 0.004), "0.500 ± 0.004")],
        *[
            ((23.44, 1.6), "23 ± 2"),
            ((0.5, math.nan), "0.5"),
            ((-3.21, 0.25), "-3.21 ± 0.25"),
            (0.71349, "0.713"),
            (12345, "12,345"),
        ],
        *[(12345.6, "12,346"), (1e-5, "1e-05"), (None, "-"), (True, "True"), ("text", "text"), (3, "3")],
    ],
)
def test_figures_end_where_their_interval_begins(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (14.2, "14 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
