"""The world as datasets in TRL's formats: demonstrations for SFT, rankings for RM and DPO, prompts for PPO."""

import random
from typing import Any

from rlhf_recipes.world import speech
from rlhf_recipes.world.facts import HELD_OUT, KINDS, PROMPTS, Prompt
from rlhf_recipes.world.raters import rank

Row = dict[str, Any]
Splits = dict[str, list[Row]]

DEMONSTRATIONS = 240
RANKINGS = 1350
RESPONSES = 4
HELD_OUT_RANKINGS = 2
"""Rankings per held-out prompt: about 2,200 pairs to measure a reward model on."""
CARELESS = 0.5
"""Share of the demonstrations written by somebody who says whatever comes to mind."""


def demonstrations(seed: int = 0) -> Splits:
    """Rows of `prompt` and `completion`: in train of mixed quality, in test always right."""
    rng = random.Random(f"demonstrations {seed}")
    train = [{"prompt": p.text, "completion": " " + _demonstrate(p, rng)} for p in _draw(DEMONSTRATIONS, rng)]
    test = [{"prompt": p.text, "completion": " " + speech.right(p, rng)} for p in _held_out()]
    return {"train": train, "test": test}


def rankings(seed: int = 0, held_out: int = HELD_OUT_RANKINGS) -> Splits:
    """Rows of `prompt`, `responses` and `ranking` (1 is best, ties allowed) by noisy raters.

    Args:
        held_out: rankings of each held-out prompt.
    """
    rng = random.Random(f"rankings {seed}")
    train = [_ranked(p, rng) for p in _draw(RANKINGS, rng)]
    test = [_ranked(p, rng) for p in _held_out() * held_out]
    return {"train": train, "test": test}


def prompts(seed: int = 0) -> Splits:
    """Rows of `prompt` alone, as many of each kind."""
    rng = random.Random(f"prompts {seed}")
    return {
        "train": [{"prompt": p.text} for p in _draw(RANKINGS, rng)],
        "test": [{"prompt": p.text} for p in _held_out()],
    }


def _draw(n: int, rng: random.Random) -> list[Prompt]:
    """As many prompts of each kind, in random order, none of them held out."""
    drawn: list[Prompt] = []
    for kind in KINDS:
        drawn += rng.sample([p for p in PROMPTS.values() if p.kind == kind and p.text not in HELD_OUT], n // len(KINDS))
    rng.shuffle(drawn)
    return drawn


def _held_out() -> list[Prompt]:
    return [prompt for prompt in PROMPTS.values() if prompt.text in HELD_OUT]


def _demonstrate(prompt: Prompt, rng: random.Random) -> str:
    if rng.random() < CARELESS:
        return speech.sample(prompt, rng)
    return speech.lengthen(speech.right(prompt, rng), prompt, rng, remarks=rng.choice((0, 0, 0, 1)))


def _ranked(prompt: Prompt, rng: random.Random) -> Row:
    responses: list[str] = []
    while len(responses) < RESPONSES:
        response = " " + speech.sample(prompt, rng)
        if response not in responses:
            responses.append(response)
    return {"prompt": prompt.text, "responses": responses, "ranking": rank(prompt.text, responses, rng)}
