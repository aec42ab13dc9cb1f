"""The command line of what goes through several stages, as make hands it on: what all get, and what each gets alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def by_stage(
    command: str, story: str, arguments: Sequence[str], *, keys: Sequence[str], stages: Sequence[str]
) -> tuple[dict[str, str], list[str], dict[str, list[str]]]:
    """Split `<key>=<value> <overrides of all stages> --sft <its own> --rm <its own> ...`.

    Args:
        command: its name, for the help.
        story: what it does, for the help.
        keys: what the command takes for itself. The last word on a key counts.
        stages: each has a flag of its name.

    Returns:
        The values of those keys that were given, the overrides of all stages, and those of each alone.
    """
    parser = argparse.ArgumentParser(command, description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "common", nargs="*", metavar="key=value", help=f"{', '.join(keys)}, and overrides of every stage"
    )
    for stage in stages:
        parser.add_argument(f"--{stage}", nargs="*", default=[], metavar="key=value", help=f"those of {stage} alone")
    own = vars(parser.parse_args(arguments))
    split = [(*override.partition("=")[::2], override) for override in own.pop("common")]
    given = {key: value for key, value, _ in split if key in keys}
    return given, [override for key, _, override in split if key not in keys], own
