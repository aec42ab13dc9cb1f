"""Recipes run in tests by their command line, in this process: a new one would import torch again, for seconds."""

import contextlib
import importlib
import io
import sys


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
