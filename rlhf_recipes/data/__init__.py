"""One way in for all data: hub datasets, local files, the embedded world and mixtures of them, checked and split.

    loaded = load(cfg.data, "preferences", seed=0)
    loaded.train, loaded.test        # datasets.Dataset in TRL's formats, with no prompt in common

`cfg.data` names what each stage reads (`sft`, `preferences`, `prompts`: one source or a list of them, see Source) and
`heldout`, the share or number of prompts that no stage trains on.
"""

from rlhf_recipes.data.formats import STAGES
from rlhf_recipes.data.lengths import check_batch, fit
from rlhf_recipes.data.loading import Loaded, describe, heldout_prompts, load
from rlhf_recipes.data.sources import Source, is_world, parse
from rlhf_recipes.data.tokens import comparisons, demonstrations

__all__ = [
    "STAGES",
    "Loaded",
    "Source",
    "check_batch",
    "comparisons",
    "demonstrations",
    "describe",
    "fit",
    "heldout_prompts",
    "is_world",
    "load",
    "parse",
]
