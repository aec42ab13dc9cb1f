"""The manifest of a stage: what it was made from and with, and what follows from it when the stage is opened again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import disk

SCHEMA = 1
MANIFEST = "manifest.json"

PACKAGES = (
    "rlhf-recipes",
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
)

# Keys that do not change what a stage makes. Of the data, its fingerprint is compared, and not how it was written down.
NEUTRAL = (
    *("run", "runs_dir", "overwrite", "data.*"),
    *("training.output_dir", "training.logging_*", "training.log_*", "training.report_to", "training.run_name"),
    *("training.project", "training.trackio_*", "training.push_to_hub", "training.hub_*", "training.disable_tqdm"),
    *("training.save_steps", "training.save_strategy", "training.save_total_limit"),
    *("training.dataloader_num_workers", "training.dataloader_pin_memory", "training.dataloader_prefetch_factor"),
    *("training.dataloader_persistent_workers", "training.dataset_num_proc", "training.skip_memory_metrics"),
    *("training.num_completions_to_print", "training.per_device_eval_batch_size", "training.eval_accumulation_steps"),
    *("training.gradient_checkpointing*", "evaluation.batch_size", "reward.min_accuracy"),
)
MICRO_BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
UNREAD = {"sft": ("start", "trunk", "frozen_top")}  # keys that a stage is given, and has no use for


@dataclass(frozen=True)
class Made:
    """A finished stage: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Equal weights, equal fingerprint."""
        return str(self.manifest["fingerprint"])

    @classmethod
    def read(cls, path: Path | str) -> Made:
        """Read a finished stage and check that its artefacts are those it was finished with.

        Raises:
            UserError: no finished stage there, or artefacts are missing or changed.
        """
        manifest = read_manifest(Path(path))
        if manifest is None or manifest["status"] != "finished":
            raise UserError(f"{path} is no finished stage: there is no {MANIFEST} in it that says so.")
        if faults := damage(Path(path), manifest, contents=True):
            raise UserError(
                f"{path} is not what it was when it was finished:\n{listed(faults)}\nMake it again: overwrite=true."
            )
        return cls(Path(path), manifest)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a stage; None where no stage was begun."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        schema = manifest["schema"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST} is damaged ({error!r}). Move {path} away and make the stage again."
        ) from error
    if schema > SCHEMA:
        raise UserError(f"{path / MANIFEST} is of a newer RLHF Recipes (schema {schema} > {SCHEMA}): update this one.")
    return dict(manifest)


def damage(path: Path, manifest: dict[str, Any], *, contents: bool = False) -> list[str]:
    """What is wrong with the artefacts of a finished stage, a line each."""
    faults = []
    for name, known in manifest["files"].items():
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != known["bytes"] or (contents and disk.hash_file(file) != known["sha256"]):
            faults.append(f"{name} has changed")
    return faults


def refuse_damage(path: Path, manifest: dict[str, Any]) -> None:
    """Raise if artefacts of a finished stage are missing or of another size."""
    if faults := damage(path, manifest):
        raise UserError(f"{path} is finished, but no longer whole:\n{listed(faults)}\nMake it again: overwrite=true.")


def refuse_differences(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise if what the stage was made or begun with is not what is wanted now."""
    pairs = {
        "": compared(old, new, lambda leaves: relevant(leaves, old["stage"])),
        "data.": (_read(old), _read(new)),
        "made again since, ": (old["predecessors"], old["predecessors"] | new["predecessors"]),
    }
    lines = [label + line for label, (was, now) in pairs.items() for line in differences(was, now)]
    if lines:
        finished = old["status"] == "finished"
        raise UserError(
            f"{path} is {'finished' if finished else 'unfinished'}, and was begun with something else (then -> now):\n"
            f"{listed(lines)}\n"
            "Keep it and use run=<new name>, or replace it with overwrite=true"
            + ("." if finished else ", or go on with the old values.")
        )


def doubts(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What may make a difference to a stage and is no reason to refuse it, a line each.

    An unfinished stage is going to read its rows, which `Stage.check_rows` compares; those of a finished one are not
    read again.
    """
    packages = old.get("versions", {}).keys() & new["versions"].keys()
    was, now = ({package: m["versions"][package] for package in packages} for m in (old, new))
    found = [f"Versions have changed: {', '.join(changed)}."] if (changed := differences(was, now)) else []
    if old["status"] != "finished":
        return found
    if changed := differences(_read(old, elsewhere=True), _read(new, elsewhere=True)):
        keys = ", ".join(line.partition(":")[0].replace("elsewhere.", "") for line in changed)
        found.append(f"What other stages read has changed ({keys}): they may hold out prompts that this one learned.")
    leaves = _read(new)
    hub = [key for key, path in leaves.items() if key.endswith("path") and path != "world"]
    if floating := {leaves[key]: 0 for key in hub if f"{key.removesuffix('path')}revision" not in leaves}:
        found.append(f"Whether {', '.join(floating)} changed on the hub is not looked up; a `revision` would pin it.")
    return found


def compared(
    one: Mapping[str, Any], other: Mapping[str, Any], chosen: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen leaves of two manifests' configs, with contents in place of names where both are known."""
    known = one.get("contents", {}).keys() & other.get("contents", {}).keys()
    was, now = (
        chosen(flat(m["config"]) | {key: f"contents {m['contents'][key]}" for key in known}) for m in (one, other)
    )
    return was, now


def _read(manifest: Mapping[str, Any], *, elsewhere: bool = False) -> dict[str, Any]:
    """The leaves of what a stage reads, or of what the other stages of its run do, with contents for names of files."""
    leaves = flat(_by_content(manifest["data"]))
    return {key: value for key, value in leaves.items() if ("elsewhere." in key) == elsewhere}


def _by_content(node: Any) -> Any:
    if isinstance(node, list):
        return [_by_content(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "files" in node:
        marks = {str(i): mark for i, mark in enumerate(node["files"].values())}
        node = {key: value for key, value in node.items() if key not in ("path", "test")} | {"files": marks}
    return {key: _by_content(value) for key, value in node.items()}


def refuse_other_bases(known: Mapping[Path, str | None], fingerprint: str) -> None:
    """Raise if adapters, by folder with the fingerprint of their base where it is known, are of another base."""
    if wrong := {path: base for path, base in known.items() if base not in (None, fingerprint)}:
        raise UserError(
            f"The base model has the fingerprint {fingerprint}, and here are adapters of another:\n"
            + listed([f"{path}: {base}" for path, base in wrong.items()])
            + "\nUse the model= they were made with, or start afresh with run=<new name>."
        )


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, a line each."""
    return [
        f"{key}: {_short(was.get(key))} -> {_short(now.get(key))}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def plain_config(cfg: Any) -> dict[str, Any]:
    """The config as a manifest gives it back, so that the two compare equal; keys that nobody set are left out."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return dict(disk.plain(_set(cfg)))


def _set(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _set(value) for key, value in node.items() if value != MISSING}


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, and of lists of dicts, by dotted key."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = {str(i): item for i, item in enumerate(node)}
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}


def relevant(leaves: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Those leaves of a config that shape what the stage makes, but for defaults: they need not be there."""
    from rlhf_recipes.config import options  # it imports what imports this

    defaults = {key: option.value for key, option in options.options(stage).items()}
    neutral = (*NEUTRAL, *UNREAD.get(stage, ()))
    return {
        key: "null" if value is None else value
        for key, value in _in_rows(leaves, defaults).items()
        if not any(fnmatch(key, pattern) for pattern in neutral) and not (key in defaults and value == defaults[key])
    }


def _in_rows(leaves: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of micro-batches as counts of rows: 8 x 4 and 4 x 8 are one batch."""
    size, *counts = (f"training.{name}" for name in MICRO_BATCHES)
    values = {key: leaves.get(key, defaults.get(key)) for key in (size, *counts)}
    if not isinstance(values[size], int):
        return dict(leaves)
    rows = {f"{key} x {MICRO_BATCHES[0]}": values[size] * n for key in counts if isinstance(n := values[key], int)}
    return {key: value for key, value in leaves.items() if key not in values} | rows


def iso(moment: float) -> str:
    """A moment, in seconds since 1970, as manifests hold it."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def moment(iso: str) -> float:
    """The reverse of `iso`."""
    return datetime.fromisoformat(iso).timestamp()


def versions() -> dict[str, str]:
    """The installed versions of the packages that matter."""
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def device() -> str:
    """The GPUs, where torch sees any, or the CPU with its cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores"


def listed(items: Sequence[str]) -> str:
    """The items of a message, an indented line each, 20 at the most."""
    more = [f"... and {len(items) - 20} more"] if len(items) > 20 else []
    return "\n".join(f"  {item}" for item in [*items[:20], *more])


def _short(value: Any) -> str:
    text = "(not set)" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
