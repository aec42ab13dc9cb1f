"""A stage of a run, opened: it is skipped, resumed, refused or started, and finished last of all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import disk
from rlhf_recipes.runs.card import model_card
from rlhf_recipes.runs.commands import make_command, sweep_folder, typed_overrides
from rlhf_recipes.runs.contents import contents
from rlhf_recipes.runs.manifest import (
    MANIFEST,
    SCHEMA,
    Made,
    compared,
    device,
    differences,
    doubts,
    flat,
    iso,
    listed,
    moment,
    plain_config,
    read_manifest,
    refuse_damage,
    refuse_differences,
    refuse_other_bases,
    versions,
)
from rlhf_recipes.runs.memory import PeakMemory

if TYPE_CHECKING:
    from rlhf_recipes.data import Loaded

LOCK = ".lock"
SAVING = ".saving"  # artefacts on their way into the stage
CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"  # what the trainer logged, a line for each time
REPLACED = (
    "README.md",
    "training_args.bin",
)  # PEFT's empty card and a pickle with paths: ours and config.yaml say more
FIXED = (  # settled where the run's first adapter was made
    *("model.name_or_path", "model.revision", "model.chat_template", "model.eos_token", "model.pad_token"),
    "lora.",
)


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
    _spare: list[Path] = field(default_factory=list)  # checkpoints that go when the stage is finished

    @classmethod
    def open(
        cls,
        cfg: Any,
        name: str,
        *,
        predecessors: Sequence[str] = (),
        others: Sequence[Path] = (),
        data_fingerprint: Mapping[str, Any],
        overrides: Sequence[str] | None = None,
    ) -> Stage:
        """Decide between start, resume and skip, and lock the stage unless it is skipped.

        Args:
            cfg: the composed config (DictConfig or dict) with `run`, `runs_dir` and `overwrite`.
            name: the stage and its folder; the jobs of a sweep get a folder each below it.
            predecessors: stages of the same run that must be finished.
            others: folders of further adapters that it reads: jobs of a sweep, stages of other runs. One that no stage
                made is not looked into.
            data_fingerprint: what `data.describe` says of the data that this stage reads.
            overrides: the command line, for messages and the model card; Hydra's by default.

        Raises:
            UserError: this stage configured differently, damaged or in use; a predecessor missing or stale.
        """
        config = plain_config(cfg)
        overwrite = bool(config["overwrite"])
        run = run_folder(config)
        path = run / name / sweep_folder()
        wanted = {
            "schema": SCHEMA,
            "stage": name,
            "run": config["run"],
            "seed": config.get("seed"),
            "overrides": typed_overrides() if overrides is None else list(overrides),
            "config": config,
            "contents": contents(flat(config)),
            "data": disk.plain(data_fingerprint),
            "versions": versions(),
            "rows": None,  # known when the data are loaded, see `check_rows`
            "base": None,  # known when the model is loaded, see `check_base`
        }
        manifest = read_manifest(path)
        if manifest and manifest["status"] == "finished" and not overwrite:
            read = {p: run / p for p in predecessors} | {str(p): p for p in others}
            there = {p: m for p, folder in read.items() if (m := read_manifest(folder))}
            wanted["predecessors"] = {p: m["fingerprint"] for p, m in there.items() if m["status"] == "finished"}
            refuse_damage(path, manifest)
            refuse_differences(path, manifest, wanted)
            again = [f"{p} was begun again and is unfinished." for p in there if p not in wanted["predecessors"]]
            return cls(name, path, "skip", manifest, _skip_message(path, manifest, doubts(manifest, wanted) + again))

        before = {p: _predecessor(run, p, wanted) for p in predecessors}
        before |= {str(p): Made.read(p) for p in others if read_manifest(p)}
        wanted["predecessors"] = {p: made.fingerprint for p, made in before.items()}
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = disk.acquire(path / LOCK) if _main_process() else None
        except OSError as error:
            raise disk.disk_fault(error, path) or UserError(
                f"Cannot write to {path}: {error.strerror}. Mend that, or set runs_dir=<another folder>."
            ) from error
        if lock and not overwrite and (now := read_manifest(path)) and now["status"] == "finished":
            lock.close()
            raise UserError(f"{path} has just been finished by another process: run the command again.")
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
        old, writes = read_manifest(self.path), self._lock is not None
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

        self.manifest |= {"status": "unfinished", "started": iso(time.time()), "seconds": 0.0}
        self.manifest["attempts"] = 1 + (old["attempts"] if old else 0)
        if old and (checkpoint := _newest_checkpoint(self.path)):
            refuse_differences(self.path, old, self.manifest)
            self.state, self.resume_from = "resume", str(checkpoint)
            self.message = "\n  ".join([f"{self.path} resumes from {checkpoint.name}.", *doubts(old, self.manifest)])
            written = (checkpoint / "trainer_state.json").stat().st_mtime  # time counts up to the checkpoint
            seconds = old["seconds"] + max(0.0, written - moment(old["started"]))
            self.manifest |= {"base": old["base"], "rows": old.get("rows"), "seconds": seconds}
        elif old:
            self.message = f"{self.path} was broken off before its first checkpoint: it starts again."
        if writes:
            self._remove_broken()
            disk.write_json(self.path / MANIFEST, self.manifest)
            disk.write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.manifest["config"])))
        self._memory = PeakMemory()

    @property
    def checkpoints_dir(self) -> Path:
        """Where the trainer keeps its checkpoints (its `output_dir`)."""
        return self.path / CHECKPOINTS

    @property
    def arguments(self) -> dict[str, Any]:
        """What a stage says to its trainer's arguments: where to write, the seed, and its name on a dashboard."""
        where = "/".join(self.path.parts[-2 if self.path.name == self.name else -3 :])
        return {
            "output_dir": self.checkpoints_dir,
            "seed": self.manifest["seed"],
            "run_name": where,
            "project": "rlhf-recipes",
        }

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
        refuse_other_bases(known, fingerprint)
        # what came from the hub is in the cache by now
        found = contents(flat(self.manifest["config"])) | self.manifest["contents"]
        self._note({"base": fingerprint, "contents": found})

    def check_rows(self, *loaded: Loaded | None) -> None:
        """Refuse to go on with other rows than the stage was begun with; write them down otherwise.

        Raises:
            UserError: with what may be the reason.
        """
        fingerprints = [part.fingerprint for part in loaded if part]
        if self.manifest["rows"] not in (None, fingerprints):
            raise UserError(
                f"{self.path} is unfinished, and was begun with other rows: a file that another stage reads holds out "
                "other prompts, the hub has changed a dataset without a `revision`, or this version reads rows "
                "otherwise. Undo that, use run=<new name>, or start it afresh with overwrite=true."
            )
        self._note({"rows": fingerprints})

    def _note(self, known: Mapping[str, Any]) -> None:
        self.manifest |= known
        if self._lock:
            disk.write_json(self.path / MANIFEST, self.manifest)

    def train(self, trainer: Any) -> None:
        """Train, in a resume from the checkpoint on, and keep the newest checkpoint until the stage is finished.

        With `save_total_limit=1` the Trainer deletes it when training ends, unless it is the best one: a kill in the
        final evaluation would cost all steps since the best. From a checkpoint at which training had ended, the Trainer
        would take one more step before it looks whether to stop.
        """
        args, one = trainer.args, trainer.args.save_total_limit == 1 and trainer.args.metric_for_best_model
        if one:
            args.save_total_limit = 2  # the best and the newest one, which are there during training anyway
        ended = self.resume_from is not None and _training_ended(Path(self.resume_from))
        if ended:
            trainer._run_epoch = lambda **_: None
        trainer.train(resume_from_checkpoint=self.resume_from)
        if ended:  # the Trainer's summary is one of no steps
            trainer.state.log_history = [row for row in trainer.state.log_history if "train_loss" not in row]
        if one and (best := trainer.state.best_model_checkpoint):
            kept = Path(best).name
            self._spare = [p for p in self.checkpoints_dir.glob("checkpoint-*") if p.name != kept]

    def finish(
        self,
        metrics: Mapping[str, Any],
        *,
        save: Callable[[str], object] | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
        log: Sequence[Mapping[str, Any]] = (),
        base_fingerprint: str | None = None,
    ) -> None:
        """Write artefacts, metrics and model card, and last of all the manifest that says `finished`.

        Args:
            metrics: the final figures, for `metrics.json`.
            save: writes artefacts into the folder it is given, e.g. `trainer.save_model`; others may lie in `saving`.
            samples: prompts with their completions, for `samples.json`.
            log: the trainer's log history, for `log.jsonl`; the checkpoints that are kept need not go to the end.
            base_fingerprint: of the base model, checked as by `check_base`.

        Raises:
            UserError: an artefact holds NaN or infinity, or the disk is full; checkpoints stay, and the stage stays
                unfinished.
        """
        if base_fingerprint is not None:
            self.check_base(base_fingerprint)
        if not self._lock:
            return
        from rlhf_recipes.finite import SKIPPED, refuse_saved, skipped_steps

        saving = self.saving
        metrics = {**metrics, SKIPPED: skipped} if (skipped := skipped_steps(log)) else metrics
        try:
            if save is not None:
                save(str(saving))
            refuse_saved(saving.rglob("*"), self.checkpoints_dir)
            for name in REPLACED:
                (saving / name).unlink(missing_ok=True)
            made = {str(f.relative_to(saving)): f for f in sorted(saving.rglob("*")) if f.is_file()}
            files = {name: {"bytes": f.stat().st_size, "sha256": disk.hash_file(f)} for name, f in made.items()}
            disk.move_into(saving, self.path)
            self.manifest |= {
                "status": "finished",
                "finished": iso(time.time()),
                "seconds": round(self.seconds, 1),
                "peak_memory": self.peak_memory(),
                "device": device(),
                "python": platform.python_version(),
                "platform": f"{platform.system()} {platform.machine()}",
                "files": files,
                # of weights and scale alone: PEFT writes its config in another order each time
                "fingerprint": disk.hash_value(
                    {n: f["sha256"] for n, f in files.items() if n.endswith((".safetensors", "head.json"))}
                ),
            }
            chain = [*(p.manifest for p in self.predecessors.values()), self.manifest]
            disk.write_json(self.path / "metrics.json", metrics)
            if samples:
                disk.write_json(self.path / "samples.json", {"samples": samples})
            if log:
                disk.write(self.path / LOG, "".join(f"{json.dumps(disk.plain(row))}\n" for row in log))
            disk.write(self.path / "README.md", model_card(chain, disk.plain(metrics)))
            disk.write_json(self.path / MANIFEST, self.manifest)
            for checkpoint in self._spare:
                shutil.rmtree(checkpoint, ignore_errors=True)
        except Exception as error:
            if fault := disk.disk_fault(error, self.path):
                raise fault from error
            raise
        finally:
            shutil.rmtree(saving, ignore_errors=True)

    @property
    def seconds(self) -> float:
        """Wall time so far, with that of earlier attempts up to the checkpoint resumed from."""
        return float(self.manifest["seconds"]) + time.time() - moment(self.manifest["started"])

    def peak_memory(self) -> dict[str, int]:
        """Peak memory in MB by kind: `rss`, `anonymous`, `gpu`, `reserved`."""
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
        """Of a stage that was refused before it made anything; sweeps below it and other stages of the run stay."""
        for name in (MANIFEST, "config.yaml", LOCK):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints_dir, self.path, self.path.parent):
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


def finished(cfg: Any, name: str) -> Made:
    """A finished stage of the run, for those who only read it.

    Raises:
        UserError: it is missing, unfinished, damaged, of another base, or came from stages that were made again since.
    """
    config = plain_config(cfg)
    wanted = {"overrides": typed_overrides(), "config": config, "contents": contents(flat(config))}
    return _predecessor(run_folder(config), name, wanted)


@contextmanager
def reading(cfg: Any, name: str) -> Iterator[Path]:
    """A folder of a run for what is found out about its stages, locked: made at the first use, taken away if empty.

    Raises:
        UserError: there is no such run, another process is at it, or the disk is full.
    """
    run = run_folder(plain_config(cfg))
    folder = run / name
    if not run.is_dir():
        there = sorted(p.name for p in run.parent.glob("*") if p.is_dir()) if run.parent.is_dir() else []
        raise UserError(f"{run} is no run: {'there are ' + ', '.join(there) if there else 'none was made yet'}.")
    try:
        folder.mkdir(exist_ok=True)
        lock = disk.acquire(folder / LOCK)
    except OSError as error:
        raise disk.disk_fault(error, folder) or UserError(f"Cannot write to {folder}: {error.strerror}.") from error
    try:
        yield folder
    except Exception as error:
        if fault := disk.disk_fault(error, folder):
            raise fault from error
        raise
    finally:
        lock.close()
        if [p.name for p in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _predecessor(run: Path, name: str, wanted: Mapping[str, Any]) -> Made:
    path, manifest, overrides = run / name, read_manifest(run / name), wanted["overrides"]
    command = make_command([name], overrides)
    if manifest is None:
        raise UserError(f"{path} is missing. Make it first: {command}")
    if pid := disk.holder(path / LOCK):
        raise UserError(f"{path} is being made by process {pid}: wait for it.")
    if manifest["status"] != "finished":
        raise UserError(f"{path} is unfinished. Finish it first: {command}")
    for earlier, fingerprint in manifest["predecessors"].items():
        now = read_manifest(run / earlier)
        if now and now.get("fingerprint") not in (None, fingerprint):
            again = make_command([name], overrides, "overwrite=true")
            raise UserError(f"{path} came from another {earlier} than {run / earlier} is now. Make it again: {again}")
    fixed = compared(manifest, wanted, lambda leaves: {k: v for k, v in leaves.items() if k.startswith(FIXED)})
    if changed := differences(*fixed):
        raise UserError(
            f"{path} was made with another base or adapter, or other tokens, which later stages cannot change:\n"
            + listed(changed)
            + "\nLeave these out, or make all stages with them: run=<new name>."
        )
    return Made.read(path)


def _stale_after(path: Path) -> str:
    """A clause that names the stages of the run that were made from this one."""
    others = [(p.parent.name, read_manifest(p.parent)) for p in sorted(path.parent.glob(f"*/{MANIFEST}"))]
    stale = [name for name, manifest in others if manifest and path.name in manifest["predecessors"]]
    return f"; stages made from the old one must be made again too: {', '.join(stale)}" if stale else ""


def run_folder(config: Mapping[str, Any]) -> Path:
    """`runs/<run>/` of a composed config.

    Raises:
        UserError: the name of the run cannot be that of a folder.
    """
    run = str(config["run"])
    if not re.fullmatch(r"\w[\w.+-]*", run):
        raise UserError(
            f"run={run!r} cannot be the name of a folder: use letters, digits, and . _ + - after the first."
        )
    return Path(config["runs_dir"]) / run


def _newest_checkpoint(path: Path) -> Path | None:
    found = [p for p in (path / CHECKPOINTS).glob("checkpoint-*") if _complete(p)]
    return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's own state in a checkpoint; empty in one that was not written to the end.

    Source: `transformers.Trainer._save_checkpoint` writes model, optimizer, scheduler, random state, and the trainer's
    own state last; older checkpoints are removed after that.
    """
    try:
        return dict(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return {}


def _complete(checkpoint: Path) -> bool:
    return checkpoint.name == f"checkpoint-{_trainer_state(checkpoint).get('global_step')}"


def _training_ended(checkpoint: Path) -> bool:
    """Whether training was over at a checkpoint: by its number of steps, or since a callback stopped it."""
    control = _trainer_state(checkpoint).get("stateful_callbacks", {}).get("TrainerControl", {})
    return bool(control.get("args", {}).get("should_training_stop"))


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _skip_message(path: Path, manifest: dict[str, Any], doubts: list[str]) -> str:
    when = datetime.fromisoformat(manifest["finished"]).astimezone().strftime("%Y-%m-%d %H:%M")
    skipped = f"{path} is finished ({when}) and unchanged: skipped. overwrite=true makes it again."
    return "\n  ".join([skipped, *doubts])
