"""Run folders: `runs/<run>/<stage>/` holds what a stage made, and opening a stage decides what is left to do.

A stage that is finished and unchanged is skipped, an unfinished one resumes from its newest complete checkpoint, and
one that was configured differently, or whose data or predecessor changed, is refused with the list of what differs.
Nothing here imports torch: a skip takes a moment.

    with Stage.open(cfg, "rm", predecessors=("sft",), data_fingerprint=describe(cfg.data, "preferences")) as stage:
        if stage.state != "skip":
            args = build(RewardConfig, cfg.training, output_dir=str(stage.checkpoints_dir))
            ...                                         # stage.adapter("sft") is the SFT adapter's folder
            trainer.train(resume_from_checkpoint=stage.resume_from)
            stage.finish(metrics, save=trainer.save_model)
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

from omegaconf import MISSING, OmegaConf

from rlhf_recipes import disk
from rlhf_recipes.card import model_card
from rlhf_recipes.errors import UserError
from rlhf_recipes.memory import PeakMemory

SCHEMA = 1
MANIFEST = "manifest.json"
LOCK = ".lock"
SAVING = ".saving"  # artefacts on their way into the stage
CHECKPOINTS = "checkpoints"
REPLACED = (
    "README.md",
    "training_args.bin",
)  # PEFT's empty card and a pickle with paths: ours and config.yaml say more

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
    *("training.save_steps", "training.save_strategy", "training.save_total_limit", "training.save_only_model"),
    *("training.dataloader_num_workers", "training.dataloader_pin_memory", "training.dataloader_prefetch_factor"),
    *("training.dataloader_persistent_workers", "training.dataset_num_proc", "training.skip_memory_metrics"),
    *(
        "reward.min_accuracy",
        "training.num_completions_to_print",
        "training.per_device_eval_batch_size",
        "training.eval_accumulation_steps",
    ),
)
FIXED = ("model.name_or_path", "model.revision", "lora.")  # settled where the run's first adapter was made
UNREAD = {"sft": ("start", "trunk")}  # keys that a stage is given, and has no use for

# Overrides that the stages of a run have in common: the command for a missing predecessor carries them along.
SHARED = ("run", "runs_dir", "seed", "model", "data", "quantization", "lora", "hardware", "start", "trunk")


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
        manifest = _manifest(Path(path))
        if manifest is None or manifest["status"] != "finished":
            raise UserError(f"{path} is no finished stage: there is no {MANIFEST} in it that says so.")
        if faults := _damage(Path(path), manifest, contents=True):
            raise UserError(f"{path} is not what it was when it was finished:\n{_lines(faults)}")
        return cls(Path(path), manifest)


@dataclass
class Stage:
    """One stage of a run, opened: what to do, where, and from where on."""

    name: str
    path: Path
    state: Literal["start", "resume", "skip"]
    manifest: dict[str, Any]
    message: str  # one line for the person at the terminal, empty at a plain start
    resume_from: str | None = None  # checkpoint for `trainer.train(resume_from_checkpoint=...)`
    predecessors: dict[str, Made] = field(default_factory=dict)
    _lock: IO[str] | None = None
    _memory: PeakMemory | None = None

    @classmethod
    def open(
        cls,
        cfg: Any,
        name: str,
        *,
        predecessors: Sequence[str] = (),
        data_fingerprint: Mapping[str, Any],
        overrides: Sequence[str] | None = None,
    ) -> Stage:
        """Decide between start, resume and skip, and lock the stage unless it is skipped.

        Args:
            cfg: the composed config (DictConfig or dict) with `run`, `runs_dir` and `overwrite`.
            name: the stage and its folder; the jobs of a sweep get a folder each below it.
            predecessors: stages of the same run that must be finished.
            data_fingerprint: what `data.describe` says of the data that this stage reads.
            overrides: the command line, for messages and the model card; Hydra's by default.

        Raises:
            UserError: this stage configured differently, damaged or in use; a predecessor missing or stale.
        """
        config = _plain_config(cfg)
        overwrite = bool(config["overwrite"])
        run = _run_folder(config)
        path = run / name / _sweep_folder()
        wanted = {
            "schema": SCHEMA,
            "stage": name,
            "run": config["run"],
            "seed": config.get("seed"),
            "overrides": _task_overrides() if overrides is None else list(overrides),
            "config": config,
            "config_hash": disk.hash_value(_relevant(config, name)),
            "data": disk.plain(data_fingerprint),
            "base": None,  # known when the model is loaded, see `check_base`
        }
        manifest = _manifest(path)
        if manifest and manifest["status"] == "finished" and not overwrite:
            there = {p: m for p in predecessors if (m := _manifest(run / p)) and m["status"] == "finished"}
            wanted["predecessors"] = {p: m["fingerprint"] for p, m in there.items()}
            _refuse_damage(path, manifest)
            _refuse_differences(path, manifest, wanted)
            return cls(name, path, "skip", manifest, _skip_message(path, manifest))

        before = {p: _predecessor(run, p, wanted["overrides"], config) for p in predecessors}
        wanted["predecessors"] = {p: made.fingerprint for p, made in before.items()}
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = disk.acquire(path / LOCK) if _main_process() else None
        except OSError as error:
            raise disk.disk_fault(error, path) or UserError(
                f"Cannot write to {path}: {error.strerror}. Mend that, or set runs_dir=<another folder>."
            ) from error
        if lock and not overwrite and (now := _manifest(path)) and now["status"] == "finished":
            lock.close()  # another process finished it just before the lock was ours
            return cls.open(
                cfg, name, predecessors=predecessors, data_fingerprint=data_fingerprint, overrides=overrides
            )
        stage = cls(name, path, "start", wanted, "", predecessors=before, _lock=lock)
        try:
            stage._begin(overwrite)
        except BaseException as error:
            stage.close()
            if fault := disk.disk_fault(error, path):
                raise fault from error
            raise
        return stage

    def _begin(self, overwrite: bool) -> None:
        """Clear what an earlier attempt left half done, find the checkpoint, and write down that the stage has begun.

        Of several processes rank 0 alone holds the lock and writes; the others come to the same decision by reading.
        """
        old, writes = _manifest(self.path), self._lock is not None
        checkpoint = None
        if old is None:
            foreign = [p.name for p in self._contents() if not (p / MANIFEST).exists() and p.name[0] != "."]
            if foreign and writes:
                raise UserError(
                    f"{self.path} holds files that no stage made: {', '.join(sorted(foreign)[:5])}. "
                    "Move them, or use run=<new name>."
                )
        elif overwrite or old["status"] == "removing":
            self.message = f"{self.path} is made again{_stale_after(self.path)}."
            if writes:
                self._clear(old)
            old = None
        elif checkpoint := _newest_checkpoint(self.path):
            _refuse_differences(self.path, old, self.manifest)

        self.manifest |= {"status": "unfinished", "started": _iso(time.time()), "attempts": 1, "seconds": 0.0}
        if old:
            self.manifest["attempts"] = old["attempts"] + 1
            self.message = f"{self.path} was broken off before its first checkpoint: it starts again."
        if old and checkpoint:
            self.state, self.resume_from = "resume", str(checkpoint)
            self.message = f"{self.path} resumes from {checkpoint.name}."
            self.manifest["base"] = old["base"]
            written = (checkpoint / "trainer_state.json").stat().st_mtime  # time counts up to the checkpoint
            self.manifest["seconds"] = old["seconds"] + max(0.0, written - _moment(old["started"]))
        if writes:
            self._remove_broken()
            disk.write_json(self.path / MANIFEST, self.manifest)
            disk.write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.manifest["config"])))
        self._memory = PeakMemory()

    @property
    def checkpoints_dir(self) -> Path:
        """Where the trainer keeps its checkpoints (its `output_dir`)."""
        return self.path / CHECKPOINTS

    def adapter(self, name: str) -> Path | None:
        """The folder of the adapter that a predecessor made; None if the stage was opened without that predecessor."""
        return self.predecessors[name].path if name in self.predecessors else None

    @property
    def saving(self) -> Path:
        """A folder for artefacts; `finish` moves them into the stage."""
        folder = self.path / SAVING
        folder.mkdir(exist_ok=True)
        return folder

    def check_base(self, fingerprint: str) -> None:
        """Refuse adapters of another base, and a base that changed since this stage began; write it down otherwise.

        Raises:
            UserError: with the stages concerned and both fingerprints.
        """
        known = {made.path: made.manifest["base"] for made in self.predecessors.values()}
        known[self.path] = self.manifest["base"]
        if wrong := {path: base for path, base in known.items() if base not in (None, fingerprint)}:
            raise UserError(
                f"The base model has the fingerprint {fingerprint}, and here are adapters of another:\n"
                + _lines([f"{path}: {base}" for path, base in wrong.items()])
                + "\nUse the model= they were made with, or start afresh with run=<new name>."
            )
        self.manifest["base"] = fingerprint
        if self._lock:
            disk.write_json(self.path / MANIFEST, self.manifest)

    def finish(
        self,
        metrics: Mapping[str, Any],
        *,
        save: Callable[[str], object] | None = None,
        samples: Sequence[Mapping[str, str]] = (),
        base_fingerprint: str | None = None,
    ) -> None:
        """Write artefacts, metrics and model card, and last of all the manifest that says `finished`.

        Args:
            metrics: the final figures, for `metrics.json`.
            save: writes artefacts into the folder it is given, e.g. `trainer.save_model`; others may lie in `saving`.
            base_fingerprint: of the base model, checked as by `check_base`.

        Raises:
            UserError: the disk is full; checkpoints stay, and the stage stays unfinished.
        """
        if base_fingerprint is not None:
            self.check_base(base_fingerprint)
        if not self._lock:
            return
        saving = self.saving
        try:
            if save is not None:
                save(str(saving))
            for name in REPLACED:
                (saving / name).unlink(missing_ok=True)
            made = {str(f.relative_to(saving)): f for f in sorted(saving.rglob("*")) if f.is_file()}
            listed = {name: {"bytes": f.stat().st_size, "sha256": disk.hash_file(f)} for name, f in made.items()}
            disk.move_into(saving, self.path)
            self.manifest |= {
                "status": "finished",
                "finished": _iso(time.time()),
                "seconds": round(self.seconds, 1),
                "peak_memory": self.peak_memory(),
                "device": _device(),
                "python": platform.python_version(),
                "platform": f"{platform.system()} {platform.machine()}",
                "versions": _versions(),
                "files": listed,
                # of the weights alone: PEFT writes its config in another order each time
                "fingerprint": disk.hash_value(
                    {n: f["sha256"] for n, f in listed.items() if n.endswith(".safetensors")}
                ),
            }
            chain = [*(p.manifest for p in self.predecessors.values()), self.manifest]
            disk.write_json(self.path / "metrics.json", metrics)
            if samples:
                disk.write_json(self.path / "samples.json", {"samples": samples})
            disk.write(self.path / "README.md", model_card(chain, disk.plain(metrics)))
            disk.write_json(self.path / MANIFEST, self.manifest)
        except Exception as error:
            if fault := disk.disk_fault(error, self.path):
                raise fault from error
            raise
        finally:
            shutil.rmtree(saving, ignore_errors=True)

    @property
    def seconds(self) -> float:
        """Wall time so far, with that of earlier attempts up to the checkpoint resumed from."""
        return float(self.manifest["seconds"]) + time.time() - _moment(self.manifest["started"])

    def peak_memory(self) -> dict[str, int]:
        """Peak memory in MB by kind: `rss`, `anonymous`, `gpu`."""
        return self._memory.peaks() if self._memory else {}

    def close(self) -> None:
        """Give the lock back; the end of the process does the same."""
        if self._memory:
            self._memory.stop()
        if self._lock:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        fault = disk.disk_fault(error, self.path) if error else None
        if fault and self._lock:
            self._remove_broken()  # the checkpoint that did not fit takes up room
        elif isinstance(error, UserError) and self._lock and self.state == "start" and not self._trained():
            self._leave_no_trace()
        self.close()
        if fault:
            raise fault from error

    def _trained(self) -> bool:
        return any(self.checkpoints_dir.glob("checkpoint-*")) or self.manifest["attempts"] > 1

    def _leave_no_trace(self) -> None:
        """Of a stage that was refused before it made anything; sweeps below it stay."""
        for name in (MANIFEST, "config.yaml", LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints_dir, self.path):
            with suppress(OSError):
                folder.rmdir()

    def _contents(self) -> list[Path]:
        return [p for p in self.path.iterdir() if p.name != LOCK]

    def _clear(self, old: dict[str, Any]) -> None:
        """Remove what the stage made, but no sweep below it; killed half-way, the next opening goes on with it."""
        disk.write_json(self.path / MANIFEST, old | {"status": "removing"})
        for item in self._contents():
            if item.is_dir() and not item.is_symlink():
                if not (item / MANIFEST).exists():
                    shutil.rmtree(item)
            elif item.name != MANIFEST:
                item.unlink()

    def _remove_broken(self) -> None:
        """Remove checkpoints and artefacts that were not written to the end."""
        for checkpoint in self.checkpoints_dir.glob("checkpoint-*"):
            if not _complete(checkpoint):
                shutil.rmtree(checkpoint)
        shutil.rmtree(self.path / SAVING, ignore_errors=True)


def make_command(targets: Sequence[str], overrides: Sequence[str], *more: str) -> str:
    """The make line for these stages, with those of the overrides that all stages of a run share, and `more`.

    >>> make_command(["sft"], ["run=mine", "model=qwen2.5-0.5b", "training.beta=0.1"])
    'make sft ARGS="run=mine model=qwen2.5-0.5b"'
    """
    shared = [o for o in overrides if re.split(r"[=.@]", o)[0] in SHARED]
    text = " ".join(shlex.quote(override) for override in (*shared, *more))
    quoted = shlex.quote(text) if set(text) & set('"$`\\') else f'"{text}"'
    return f"make {' '.join(targets)}" + (f" ARGS={quoted}" if text else "")


# The manifest and what follows from it


def _manifest(path: Path) -> dict[str, Any] | None:
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


def _predecessor(run: Path, name: str, overrides: list[str], config: Mapping[str, Any]) -> Made:
    path, manifest = run / name, _manifest(run / name)
    command = make_command([name], overrides)
    if manifest is None:
        raise UserError(f"{path} is missing. Make it first: {command}")
    if pid := disk.holder(path / LOCK):
        raise UserError(f"{path} is being made by process {pid}: wait for it.")
    if manifest["status"] != "finished":
        raise UserError(f"{path} is unfinished. Finish it first: {command}")
    for earlier, fingerprint in manifest["predecessors"].items():
        now = _manifest(run / earlier)
        if now and now.get("fingerprint") not in (None, fingerprint):
            again = make_command([name], overrides, "overwrite=true")
            raise UserError(f"{path} came from another {earlier} than {run / earlier} is now. Make it again: {again}")
    was, now = ({k: v for k, v in _flat(c).items() if k.startswith(FIXED)} for c in (manifest["config"], config))
    if changed := [
        f"{k}: {_short(was.get(k))} -> {_short(now.get(k))}"
        for k in was.keys() | now.keys()
        if was.get(k) != now.get(k)
    ]:
        raise UserError(
            f"{path} was made with another base or adapter, which later stages cannot change:\n"
            + _lines(sorted(changed))
            + "\nLeave these out, or make all stages with them: run=<new name>."
        )
    return Made.read(path)


def _stale_after(path: Path) -> str:
    """A clause that names the stages of the run that were made from this one."""
    others = [(p.parent.name, _manifest(p.parent)) for p in sorted(path.parent.glob(f"*/{MANIFEST}"))]
    stale = [name for name, manifest in others if manifest and path.name in manifest["predecessors"]]
    return f"; stages made from the old one must be made again too: {', '.join(stale)}" if stale else ""


def _damage(path: Path, manifest: dict[str, Any], *, contents: bool = False) -> list[str]:
    """What is wrong with the artefacts of a finished stage, a line each."""
    faults = []
    for name, known in manifest["files"].items():
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != known["bytes"] or (contents and disk.hash_file(file) != known["sha256"]):
            faults.append(f"{name} has changed")
    return faults


def _refuse_damage(path: Path, manifest: dict[str, Any]) -> None:
    if faults := _damage(path, manifest):
        raise UserError(f"{path} is finished, but no longer whole:\n{_lines(faults)}\nMake it again: overwrite=true.")


def _refuse_differences(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise if what the stage was made or begun with is not what is wanted now."""
    pairs = {
        "": (_relevant(old["config"], old["stage"]), _relevant(new["config"], new["stage"])),
        "data.": (_flat(old["data"]), _flat(new["data"])),
        "made again since, ": (old["predecessors"], old["predecessors"] | new["predecessors"]),
    }
    lines = [
        f"{label}{key}: {_short(was.get(key))} -> {_short(now.get(key))}"
        for label, (was, now) in pairs.items()
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if lines:
        finished = old["status"] == "finished"
        raise UserError(
            f"{path} is {'finished' if finished else 'unfinished'}, and was begun with something else (then -> now):\n"
            f"{_lines(lines)}\n"
            "Keep it and use run=<new name>, or replace it with overwrite=true"
            + ("." if finished else ", or go on with the old values.")
        )


def _newest_checkpoint(path: Path) -> Path | None:
    found = [p for p in (path / CHECKPOINTS).glob("checkpoint-*") if _complete(p)]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def _complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to the end.

    Source: `transformers.Trainer._save_checkpoint` writes model, optimizer, scheduler, random state, and the trainer's
    own state last; older checkpoints are removed after that.
    """
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    except (OSError, ValueError, KeyError):
        return False
    return checkpoint.name == f"checkpoint-{step}"


# The config and the command line


def _plain_config(cfg: Any) -> dict[str, Any]:
    """The config as a manifest gives it back, so that the two compare equal; keys that nobody set are left out."""
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return dict(disk.plain(_set(cfg)))


def _set(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _set(value) for key, value in node.items() if value != MISSING}


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts, and of lists of dicts, by dotted key."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = {str(i): item for i, item in enumerate(node)}
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): node}


def _relevant(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """The leaves of the config that shape what the stage makes; a null of ours is no key, one of a library's is one."""
    neutral = (*NEUTRAL, *UNREAD.get(stage, ()))
    return {
        key: "null" if value is None else value
        for key, value in _flat(config).items()
        if not any(fnmatch(key, pattern) for pattern in neutral)
        and (value is not None or key.split(".")[0] in ("training", "lora", "quantization"))
    }


def _run_folder(config: dict[str, Any]) -> Path:
    run = str(config["run"])
    if not re.fullmatch(r"\w[\w.+-]*", run):
        raise UserError(
            f"run={run!r} cannot be the name of a folder: use letters, digits, and . _ + - after the first."
        )
    return Path(config["runs_dir"]) / run


def _task_overrides() -> list[str]:
    """The overrides on Hydra's command line as people type them, without `+`, if Hydra runs."""
    if "hydra" not in sys.modules:
        return []
    from hydra.core.hydra_config import HydraConfig

    return [o.lstrip("+") for o in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []


def _sweep_folder() -> str:
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
    job = ",".join(o for o in _task_overrides() if o.split("=")[0] in swept)
    name = re.sub(r"[^\w.+=,-]", "_", job)
    return name if len(name) <= 120 else f"{name[:100]}-{disk.hash_value(job)}"


# Facts


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def _moment(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {os.cpu_count()} cores"


def _skip_message(path: Path, manifest: dict[str, Any]) -> str:
    when = datetime.fromisoformat(manifest["finished"]).astimezone().strftime("%Y-%m-%d %H:%M")
    return f"{path} is finished ({when}) and unchanged: skipped. overwrite=true makes it again."


def _lines(items: Sequence[str]) -> str:
    more = [f"... and {len(items) - 20} more"] if len(items) > 20 else []
    return "\n".join(f"  {item}" for item in [*items[:20], *more])


def _short(value: Any) -> str:
    text = "(not set)" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
