"""What lies in the files that a config names: they decide what a stage makes, and their names do not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlhf_recipes import world
from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import disk

NAMING = (  # keys whose values may be files, folders, or functions in files
    *("model.name_or_path", "model.chat_template", "training.value_init"),
    *("reward.model*", "reward.functions*", "guard.model*", "guard.functions*"),
)
BESIDE_WEIGHTS = (
    *("*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template*", "*.py", "head.json"),
)


def contents(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The values that name what can be read here, with its fingerprint for the name.

    A function's file is read, and not what it imports; a model of the hub as far as it is in the cache.

    Args:
        leaves: of a config, by dotted key.
    """
    found = {k: _marked(v) for k, v in leaves.items() if any(fnmatch(k, pattern) for pattern in NAMING)}
    if model := _model(leaves.get("model.name_or_path"), leaves.get("model.revision")):
        found["model.name_or_path"] = model
    return {key: mark for key, mark in found.items() if mark != leaves[key]}


def _marked(value: Any) -> Any:
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if not isinstance(value, str):
        return value
    place, _, function = value.rpartition(":")
    module = place if place.endswith(".py") else place.replace(".", "/") + ".py"
    if function and os.path.isfile(module):
        return f"{disk.hash_file(Path(module))[:16]}:{function}"
    path = os.path.expanduser(value)
    if os.path.isfile(path):  # `Path.is_file` raises where a template stands that is longer than names of files can be
        return disk.hash_file(Path(path))[:16]
    return _folder(Path(path)) or value if os.path.isdir(path) else value


def _model(name: Any, revision: str | None) -> str | None:
    """The fingerprint of the embedded base, or of what the hub gave for a model; None if nothing of it is here."""
    if name == "embedded":
        return _folder(world.BASE)
    if not isinstance(name, str) or os.path.exists(os.path.expanduser(name)):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub id
        return None
    return _folder(Path(config).parent) if isinstance(config, str) else None


def _folder(folder: Path) -> str | None:
    """The fingerprint of a model's or an adapter's files; None if there are none.

    Those of a stage are known by its manifest, and PEFT writes `adapter_config.json` in another order each time.
    """
    try:
        return None if (folder / "manifest.json").exists() else disk.fingerprint_weights(folder, *BESIDE_WEIGHTS)
    except UserError:
        return None
