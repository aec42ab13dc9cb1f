"""The command line of `make report`: which run, and overrides that are meant for the stages before it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes.config import compose
from rlhf_recipes.config.options import RECIPES
from rlhf_recipes.errors import UserError


def parse(arguments: Sequence[str], story: str) -> Path:
    """The folder of the run that `run=` and `runs_dir=` name; what else a recipe takes is checked and ignored.

    Raises:
        UserError: no recipe takes these overrides; the message is that of the recipe with the fewest faults.
    """
    parser = argparse.ArgumentParser("report", description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run, runs_dir; others are ignored")
    overrides = parser.parse_args(arguments).overrides
    refused = []
    for recipe in RECIPES:
        try:
            cfg = compose(recipe, overrides)
        except UserError as error:
            refused.append(str(error))
        else:
            return Path(cfg.runs_dir) / cfg.run
    raise UserError(min(refused, key=lambda message: len(message.splitlines())))
