"""Simulated raters: they see what gold sees, like a longer response a little more, and err."""

import math
import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from rlhf_recipes.world.gold import gold
from rlhf_recipes.world.speech import words

CARE = 1.7
"""What a right response is worth against a wrong one: raters prefer it in about four pairs of five."""
LENGTH_BIAS = 0.03
"""What each further word is worth."""
GRADE = 0.25
"""Raters tell no finer difference than this: smaller ones are ties."""


def utility(prompt: str, response: str) -> float:
    """What a response is worth to the raters before they err."""
    return CARE * gold(prompt, response).score + LENGTH_BIAS * len(words(response))


def rank(prompt: str, responses: Sequence[str], rng: random.Random) -> list[int]:
    """One rater's ranking of the responses: 1 is best, equals share a rank (1, 2, 2, 4).

    The noise is Gumbel's, so that without ties the chance of a ranking is Plackett-Luce in the utilities, and of a
    pair Bradley-Terry: what the reward model's loss assumes.
    """
    grades = [round((utility(prompt, r) - math.log(-math.log(rng.random()))) / GRADE) for r in responses]
    return [1 + sum(other > grade for other in grades) for grade in grades]


def pairs(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The (prompt, chosen, rejected) pairs of rankings; equals make none."""
    return [
        (row["prompt"], *((a, b) if i < j else (b, a)))
        for row in rows
        for (a, i), (b, j) in combinations(zip(row["responses"], row["ranking"], strict=True), 2)
        if i != j
    ]


def ceiling(rows: Iterable[dict[str, Any]]) -> float:
    """The raters' ceiling, which is beaten by luck alone: how often their utility before noise orders these pairs."""
    judged = [utility(p, chosen) - utility(p, rejected) for p, chosen, rejected in pairs(rows)]
    return sum((margin > 0) + 0.5 * (margin == 0) for margin in judged) / len(judged)
