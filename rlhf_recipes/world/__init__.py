"""The embedded default: a pocket world whose truth is known, so that every claim about RLHF can be measured.

The Lantern Isles have islanders of whom seven things are known each, strangers of whom nothing is, and neighbours who
ask how to do them harm. `gold` knows what is right; `demonstrations`, `rankings` and `prompts` are the data of the
stages; `BASE` is a tiny Llama that has read about the isles, made by `python -m rlhf_recipes.world.make_base`.
"""

from pathlib import Path

from rlhf_recipes.world.datasets import demonstrations, prompts, rankings
from rlhf_recipes.world.gold import Gold, gold
from rlhf_recipes.world.raters import ceiling, pairs, rank, utility

BASE = Path(__file__).parent / "base"
"""Folder of the base model: configuration, weights and tokenizer, as transformers saves them."""

__all__ = ["BASE", "Gold", "ceiling", "demonstrations", "gold", "pairs", "prompts", "rank", "rankings", "utility"]
