"""What a library says of an option while it builds an adapter, a trainer or an optimizer, as one plain line."""

import contextlib
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from rlhf_recipes.errors import UserError

BUILDERS = {"get_peft_model": "lora", "create_optimizer": "training", "create_scheduler": "training"}
"""Functions of the libraries that turn options into objects, and the section whose options those are."""


@contextlib.contextmanager
def told(overrides: Sequence[str]) -> Iterator[None]:
    """Inside, what a library refuses while it builds something ends as a `UserError` that names the options.

    With HYDRA_FULL_ERROR=1 the error stays what it was.

    Args:
        overrides: as typed, `key=value`.

    Raises:
        UserError: in place of that error.
    """
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        section = next((name for frame in frames if (name := _section(frame))), None)
        package = frames[-1].f_globals.get("__name__", "").partition(".")[0]
        if section is None or isinstance(error, UserError) or package == "rlhf_recipes" or _wants_all():
            raise
        said = " ".join(str(error).split())
        raise UserError(f"{_options(section, overrides, said)}: {package} refuses: {said}") from error


def _section(frame: FrameType) -> str | None:
    """The section of the options that a frame builds something from; None if it does not."""
    name = frame.f_code.co_name
    if name == "__init__" and type(frame.f_locals.get("self")).__name__.endswith("Trainer"):
        return "training"
    return BUILDERS.get(name)


def _options(section: str, overrides: Sequence[str], said: str) -> str:
    """Those overrides of a section whose name or value the library mentions; else all of the section; else its name."""
    own = [override.lstrip("+") for override in overrides if override.lstrip("+").startswith(f"{section}.")]
    mentioned = [o for o in own if any(_mentions(said, part) for part in (_name(o), o.partition("=")[2]))]
    return ", ".join(mentioned or own) or section


def _mentions(said: str, part: str) -> bool:
    return bool(part) and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", said) is not None


def _name(override: str) -> str:
    return override.partition("=")[0].rpartition(".")[2]


def _wants_all() -> bool:
    return bool(os.environ.get("HYDRA_FULL_ERROR"))
