"""What a run's folder holds: its stages with figures, logs and samples, what was measured of them, what is damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.errors import UserError
from rlhf_recipes.report.present import present
from rlhf_recipes.runs import disk
from rlhf_recipes.runs.manifest import MANIFEST, damage, listed, read_manifest
from rlhf_recipes.runs.stage import CHECKPOINTS, LOCK, LOG

EVALUATION, OVEROPTIMIZATION = "eval", "overoptimization"


Interval = tuple[float, float | None]
"""A mean and half of its 95% interval, where it has one."""


@dataclass(frozen=True)
class Trained:
    """A stage as it lies in the run's folder, finished or not; a job of a sweep is one of its own."""

    name: str  # `ppo`, or for a job of a sweep `ppo/training.beta=0.1`
    path: Path
    manifest: dict[str, Any]
    state: str  # `finished`, `unfinished`, `being made`
    metrics: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # the trainer's log history: figures by name, with `step`
    samples: list[dict[str, Any]] = field(default_factory=list)  # a prompt, by policy a completion, and their `scores`

    @property
    def stage(self) -> str:
        """`sft`, `rm`, `dpo` or `ppo`."""
        return self.name.partition("/")[0]

    def policies(self) -> dict[str, dict[str, Interval]]:
        """The measures of each policy of its held-out table; its own policy by its own name, `change` left out."""
        measured = {k: intervals(v) for k, v in self.metrics.items() if isinstance(v, Mapping) and k != "change"}
        return {self.name if policy == self.stage else policy: found for policy, found in measured.items() if found}


@dataclass(frozen=True)
class Run:
    """All that is known of a run. Faults are lines for the reader: what could not be read, and which file it is."""

    path: Path
    stages: list[Trained]
    evaluation: dict[str, Any]
    samples: list[dict[str, Any]]  # of the evaluation: a prompt, and by policy its completion with its scores
    overoptimization: list[dict[str, Any]]
    faults: list[str]

    @property
    def name(self) -> str:
        """The run's name, which is that of its folder."""
        return self.path.name

    @property
    def finished(self) -> list[Trained]:
        """The stages that are finished."""
        return [trained for trained in self.stages if trained.state == "finished"]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run.

        Raises:
            UserError: there is no such run, or none of its stages is finished.
        """
        if not path.is_dir():
            runs = sorted(p.name for p in path.parent.glob("*") if any(_stage_folders(p)))
            there = f"there are {', '.join(runs)}" if runs else "there is none; make one: make sft rm ppo"
            raise UserError(f"There is no run {path.name} in {path.parent}; {there}.")
        faults: list[str] = []
        stages = [stage for folder in _stage_folders(path) if (stage := _trained(path, folder, faults))]
        if not any(stage.state == "finished" for stage in stages):
            begun = ", ".join(f"{stage.name} is {stage.state}" for stage in stages) or "no stage was begun"
            more = f" What could not be read:\n{listed(faults)}" if faults else ""
            raise UserError(f"{path} has no finished stage yet ({begun}); a report is made of finished ones.{more}")
        now = {stage.name: str(stage.manifest.get("fingerprint")) for stage in stages if stage.state == "finished"}
        evaluation, samples = (
            _json(path / EVALUATION / name, kind, faults)
            for name, kind in (("metrics.json", dict), ("samples.json", list))
        )
        try:
            evaluation, samples, left_out = present(evaluation, samples, now)
        except (TypeError, ValueError, AttributeError) as error:
            left_out = [f"{EVALUATION}/metrics.json is not of the known form ({error!r}), and is left out."]
            evaluation, samples = {}, []
        faults += left_out
        points = _json(path / OVEROPTIMIZATION / "metrics.json", dict, faults).get("points", [])
        return cls(path, stages, evaluation, samples, list(points or []), faults)


def _stage_folders(run: Path) -> Iterator[Path]:
    """Folders of stages and of the jobs of their sweeps, in the order in which stages follow each other."""
    found = [file.parent for depth in ("*", "*/*") for file in run.glob(f"{depth}/{MANIFEST}")]
    order = [*TRAINING]

    def place(folder: Path) -> tuple[int, str]:
        stage = folder.relative_to(run).parts[0]
        return (order.index(stage) if stage in order else len(order), str(folder))

    return iter(sorted(found, key=place))


def _trained(run: Path, folder: Path, faults: list[str]) -> Trained | None:
    """The stage in a folder; None, and a fault, where its manifest is damaged."""
    name = folder.relative_to(run).as_posix()
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        status = manifest["status"]
        faults += [f"{name}: {fault}" for fault in (damage(folder, manifest) if status == "finished" else [])]
    except UserError as error:
        faults.append(str(error))
        return None
    except (KeyError, TypeError, AttributeError) as error:
        faults.append(f"{folder / MANIFEST} is not of the known form ({error!r}).")
        return None
    state = "finished" if status == "finished" else "being made" if disk.holder(folder / LOCK) else "unfinished"
    if state != "finished":
        return Trained(name, folder, manifest, state, log=_log(folder, faults))
    metrics = _json(folder / "metrics.json", dict, faults, missing="is missing")
    if names := [*_no_numbers(metrics)]:
        faults.append(f"{folder / 'metrics.json'}: {', '.join(names)}: NaN or infinite, which is no figure.")
    samples = _json(folder / "samples.json", dict, faults).get("samples", [])
    return Trained(name, folder, manifest, state, metrics, _log(folder, faults), samples)


def _log(folder: Path, faults: list[str]) -> list[dict[str, Any]]:
    """What the trainer logged: to the end in a finished stage, up to the newest checkpoint in an unfinished one."""
    steps = {
        int(number): file
        for file in (folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
        if (number := file.parent.name.partition("-")[2]).isdigit()
    }
    if (folder / LOG).exists():
        rows = _json(folder / LOG, list, faults)
    else:
        rows = _json(steps[max(steps)], dict, faults).get("log_history", []) if steps else []
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def _json(file: Path, kind: type, faults: list[str], missing: str = "") -> Any:
    """What a JSON or JSONL file holds; empty, with a fault, where it is damaged."""
    try:
        text = file.read_text()
        text = f"[{','.join(text.splitlines())}]" if file.suffix == ".jsonl" else text
        value = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        faults += [f"{file} {missing}."] if missing else []
        return kind()
    except (OSError, ValueError) as error:
        faults.append(f"{file} is damaged ({error}).")
        return kind()
    if not isinstance(value, kind):
        faults.append(f"{file} holds a {type(value).__name__}, and a {kind.__name__} was expected.")
        return kind()
    return value


def finite(value: object) -> float | None:
    """A number as a float; None for what is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None  # type: ignore[arg-type]


def interval(value: object) -> Interval | None:
    """A mean and half of its 95% interval, as metrics hold them; None for what is no such pair."""
    match value:
        case [mean, half] if (known := finite(mean)) is not None:
            return known, finite(half)
    return None


def intervals(values: Mapping[str, object]) -> dict[str, Interval]:
    """Those of some figures that are intervals; a mean that is no number stays NaN, to be seen."""
    known = {name: (math.nan, None) if _no_mean(value) else interval(value) for name, value in values.items()}
    return {name: value for name, value in known.items() if value is not None}


def _no_mean(value: object) -> bool:
    """Whether it is an interval whose mean was NaN or infinite, which a file may hold as null."""
    return isinstance(value, list | tuple) and len(value) == 2 and finite(value[0]) is None


def _no_numbers(node: object, name: str = "") -> Iterator[str]:
    """The dotted names of figures that are NaN or infinite."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _no_numbers(value, f"{name}.{key}" if name else str(key))
    elif _no_mean(node) or (isinstance(node, float) and not math.isfinite(node)):
        yield name
