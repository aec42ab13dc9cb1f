"""The command line of a run: the overrides that its stages share, and the folder of a sweep's job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from rlhf_recipes.runs import disk

# Overrides that the stages of a run have in common: the command for a missing predecessor carries them along.
SHARED = (
    *("run", "runs_dir", "seed", "model", "data", "quantization", "lora", "hardware", "start"),
    *("trunk", "frozen_top"),
)


def make_command(targets: Sequence[str], overrides: Sequence[str], *more: str) -> str:
    """The make line for these stages, with those of the overrides that all stages of a run share, and `more`.

    >>> make_command(["sft"], ["run=mine", "model=qwen2.5-0.5b", "training.beta=0.1"])
    'make sft ARGS="run=mine model=qwen2.5-0.5b"'
    """
    shared = [o for o in overrides if re.split(r"[=.@]", o)[0] in SHARED]
    return f"make {' '.join(targets)}{make_variable('ARGS', [*shared, *more])}"


def make_variable(name: str, overrides: Sequence[str]) -> str:
    """A variable of the make line that holds overrides, after a space; nothing for none.

    >>> make_variable("PPO_ARGS", ["training.beta=0.1"])
    ' PPO_ARGS="training.beta=0.1"'
    """
    text = " ".join(shlex.quote(override) for override in overrides)
    quoted = shlex.quote(text) if set(text) & set('"$`\\') else f'"{text}"'
    return f" {name}={quoted}" if text else ""


def typed_overrides() -> list[str]:
    """The overrides on Hydra's command line as people type them, without `+`, if Hydra runs."""
    if "hydra" not in sys.modules:
        return []
    from hydra.core.hydra_config import HydraConfig

    return [o.lstrip("+") for o in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def sweep_folder() -> str:
    """In a sweep (`-m`), this job's swept overrides as the name of a folder; else empty."""
    if "hydra" not in sys.modules:
        return ""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return ""
    typed = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])
    swept = {override.key_or_group for override in typed if override.is_sweep_override()}
    job = ",".join(o for o in typed_overrides() if o.split("=")[0] in swept)
    name = re.sub(r"[^\w.+=,-]", "_", job)
    return name if len(name) <= 120 else f"{name[:100]}-{disk.hash_value(job)}"
