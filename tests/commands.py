"""Recipes run in tests by their command line, in this process: a new one would import torch again, for seconds."""

import contextlib
import importlib
import io
import json
import sys

from rlhf_recipes import world

# Overrides of one stage: PPO moves the policy from its first iteration, and evaluates when it saves.
OWN = {"ppo": ["training.value_pretraining_passes=0", "training.eval_steps=4", "reward.min_accuracy=0"]}


def small_runs(folder):
    """Overrides of all stages: four steps, and few preferences, since held-out pairs take most of the time."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in world.rankings(0)["train"][:24]))
    return [
        *("experiment=smoke", f"runs_dir={folder}", f"data.preferences.path={pairs}"),
        *("evaluation.prompts=8", "evaluation.samples=1"),
    ]


def run(recipe, *overrides):
    """Run a recipe as `python -m recipes.<recipe>` does, in this process: its exit code and all that it wrote."""
    written = io.StringIO()
    argv, sys.argv = sys.argv, ["recipe", *overrides]
    code = 0
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            importlib.import_module(f"recipes.{recipe}").main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return code, written.getvalue()


def done(recipe, *overrides):
    """The output of a recipe that must succeed."""
    code, output = run(recipe, *overrides)
    assert code == 0, output
    return output
