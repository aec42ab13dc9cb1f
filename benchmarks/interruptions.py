"""Stages killed at random moments and resumed by the same command: writes results/interruptions.md.

    python -m benchmarks.interruptions
    python -m benchmarks.interruptions --repeats 2 --stages ppo --quantizations none

Each stage runs for three and a half epochs on a CPU. It is killed (SIGKILL) at a moment drawn uniformly from its whole
time, loading, final evaluation and finish included, and started again by the same command. What it leaves is compared
with what an uninterrupted run leaves:

- the weights of the artefacts, byte for byte: every second repeat trains with `load_best_model_at_end=false`, so that
  they are those of the last step, the others keep the best checkpoint;
- everything that was logged at every step and evaluation, but times and counts of tokens and operations;
- every figure of `metrics.json` but the seconds of the self-test, and `samples.json`.

To save the imports, a run is forked from a process that has done them (`--fresh` starts an interpreter for each). The
uninterrupted runs are always started as people start them. Finished ones are not made again.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.turns import REPOSITORY, RESULTS
from rlhf_recipes import terminal, world

STAGES = ("sft", "rm", "dpo", "ppo")
QUANTIZATIONS = ("none", "nf4")
KEPT = ("last", "best")  # which step's weights a stage leaves, by the parity of the repeat
STEPS, SAVE_STEPS = 14, 4  # four steps an epoch: it ends in the middle of one
IMPORTS = ("rlhf_recipes.ppo.trainer", "rlhf_recipes.evaluation", "rlhf_recipes.guard.callback", "bitsandbytes")
TRAINERS = ("trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "trl.trainer.dpo_trainer")
VARYING = re.compile(r"time|per_second|num_tokens|total_flos")
"""Figures of the log that may differ: TRL and transformers count tokens and operations afresh in a resume."""


@dataclass(frozen=True)
class Case:
    """A stage in one setting."""

    stage: str
    quantization: str
    kept: str

    @property
    def whole(self) -> str:
        """The name of its uninterrupted run."""
        return f"{self.quantization}-{self.kept}"

    def command(self, folder: Path, run: str) -> list[str]:
        """The overrides that its runs have in common, but for the name of the run."""
        best: dict[str, Any] = {"load_best_model_at_end": self.kept == "best"}
        if self.kept == "best" and self.stage != "ppo":
            # the highest loss, so that it is not that of the last step
            best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
        sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": STEPS}
        rollouts = {"steps_per_generation": 1, "max_completion_length": 12} if self.stage == "ppo" else {}
        saves = {"eval_strategy": "steps", "eval_steps": SAVE_STEPS, "save_steps": SAVE_STEPS}
        rates = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "logging_steps": 1}
        training = sizes | rollouts | saves | rates | best
        return [
            *(f"run={run}", f"runs_dir={folder}", f"quantization={self.quantization}", "hardware=cpu", "data=files"),
            *(f"data.{part}.path={folder / part}.jsonl" for part in ("sft", "preferences", "prompts")),
            *("evaluation.prompts=4", "evaluation.samples=1"),
            *(f"training.{key}={value}" for key, value in training.items()),
            *(["reward.min_accuracy=0"] if self.stage == "ppo" else []),
        ]


@dataclass(frozen=True)
class Repeat:
    """One run that was killed and resumed."""

    case: Case
    moment: float  # seconds after its start
    phase: str  # what the kill met
    differs: tuple[str, ...]  # from the uninterrupted run


def main() -> None:
    """Make the uninterrupted runs that are missing, kill and resume, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="kills of each stage in each quantization")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--quantizations", nargs="+", default=QUANTIZATIONS, choices=QUANTIZATIONS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fresh", action="store_true", help="start an interpreter for each run")
    parser.add_argument("--folder", type=Path, default=Path("runs/interruptions"))
    options = parser.parse_args()
    terminal.quiet()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder = options.folder.resolve()
    write_data(folder)
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload([*IMPORTS, *TRAINERS])
    repeats: list[Repeat] = []
    begun = time.monotonic()
    for quantization in options.quantizations:
        for stage in options.stages:
            chance = random.Random(f"{options.seed} {quantization} {stage}")
            for number in range(options.repeats):
                case = Case(stage, quantization, KEPT[number % len(KEPT)])
                repeats.append(interrupted(case, folder, chance, fresh=options.fresh))
                say(repeats[-1], number + 1)
    RESULTS.joinpath("interruptions.md").write_text(report(repeats, time.monotonic() - begun))


def write_data(folder: Path) -> None:
    """Few rows of the embedded world, so that an epoch has four steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "sft": world.demonstrations(0)["train"][:64],
        "preferences": world.rankings(0)["train"][:16],
        "prompts": world.prompts(0)["train"][:40],
    }
    for part, some in rows.items():
        folder.joinpath(f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def uninterrupted(case: Case, folder: Path, *, fresh: bool) -> float:
    """Make the stages of the case's uninterrupted run that are missing; gives the seconds that the stage takes."""
    for stage in ("sft", "rm", case.stage):
        if stage == "rm" and case.stage in ("sft", "dpo"):
            continue
        made = Case(stage, case.quantization, case.kept)
        if not (folder / case.whole / stage / "metrics.json").exists():
            subprocess.run([sys.executable, "-m", f"recipes.{stage}", *made.command(folder, case.whole)], check=True)
        if stage == case.stage:
            break
    known = duration_file(case, folder, fresh=fresh)
    if not known.exists():
        begun = time.monotonic()
        end(start(case, folder, clone(case, folder, "timed"), fresh=fresh))
        known.write_text(json.dumps(time.monotonic() - begun))
    return float(json.loads(known.read_text()))


def duration_file(case: Case, folder: Path, *, fresh: bool) -> Path:
    """Where the seconds are kept that the stage takes when nothing interrupts it."""
    return folder / f"seconds-{case.stage}-{case.whole}{'-fresh' * fresh}.json"


def clone(case: Case, folder: Path, run: str) -> str:
    """Give a run of this name the stages before the case's, and nothing else."""
    shutil.rmtree(folder / run, ignore_errors=True)
    for stage in ("sft", "rm"):
        made = folder / case.whole / stage
        if stage != case.stage and made.exists() and case.stage != "sft":
            shutil.copytree(made, folder / run / stage)
    return run


def start(case: Case, folder: Path, run: str, *, fresh: bool) -> BaseProcess | subprocess.Popen[bytes]:
    """Start a stage; what it says goes to a file."""
    log, command = folder / f"{run}.log", case.command(folder, run)
    if fresh:
        with log.open("a") as output:
            argv = [sys.executable, "-m", f"recipes.{case.stage}", *command]
            return subprocess.Popen(argv, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
    process = multiprocessing.Process(target=run_recipe, args=(case.stage, command, log))
    process.start()
    return process


def run_recipe(stage: str, overrides: Sequence[str], log: Path) -> None:
    """In a process of its own, what `python -m recipes.<stage>` does."""
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [f"recipes/{stage}.py", *overrides]
    importlib.import_module(f"recipes.{stage}").main()


def end(process: Any, seconds: float | None = None) -> int | None:
    """Wait for a process; gives its exit code, or None if it has not ended by then."""
    if isinstance(process, subprocess.Popen):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None
    process.join(seconds)
    return process.exitcode


def interrupted(case: Case, folder: Path, chance: random.Random, *, fresh: bool) -> Repeat:
    """Kill a run of the case at a random moment, resume it, and compare."""
    while True:
        run, moment = clone(case, folder, "interrupted"), chance.uniform(0, uninterrupted(case, folder, fresh=fresh))
        folder.joinpath(f"{run}.log").unlink(missing_ok=True)
        process, begun = start(case, folder, run, fresh=fresh), time.monotonic()
        if end(process, moment) is None:
            process.kill()
            end(process)
            break
        # it had ended before: on a machine that is less busy now, moments are drawn from a shorter time
        duration_file(case, folder, fresh=fresh).write_text(json.dumps(time.monotonic() - begun))
    phase = met(folder / run / case.stage)
    if code := end(start(case, folder, run, fresh=fresh)):
        said = (folder / f"{run}.log").read_text().strip().splitlines()[-1:]
        return Repeat(case, moment, phase, (f"exit code {code}: {' '.join(said)}",))
    one, other = (left(folder / name / case.stage) for name in (case.whole, run))
    return Repeat(case, moment, phase, tuple(n for n in sorted(one | other) if one.get(n) != other.get(n)))


def met(stage: Path) -> str:
    """What a kill met, by what it left."""
    manifest = stage / "manifest.json"
    if not manifest.exists():
        return "loading"
    if json.loads(manifest.read_text())["status"] == "finished":
        return "the last words"
    states = [int(f.parent.name.partition("-")[2]) for f in stage.glob("checkpoints/checkpoint-*/trainer_state.json")]
    if not states:
        return "loading, or steps before the first checkpoint"
    return "final evaluation" if max(states) == STEPS else "training"


def left(stage: Path) -> dict[str, Any]:
    """What a stage left, as it is compared: hashes of files, and the log."""
    manifest = json.loads((stage / "manifest.json").read_text())
    names = [n for n in manifest["files"] if n.endswith(".safetensors") or n.endswith("head.json")]
    found: dict[str, Any] = {name: manifest["files"][name]["sha256"] for name in names}
    metrics = json.loads((stage / "metrics.json").read_text())
    metrics.get("self_test", {}).pop("seconds", None)
    found["metrics.json"] = metrics
    if (stage / "samples.json").exists():
        found["samples.json"] = (stage / "samples.json").read_text()
    for line in (stage / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train_runtime" not in row:  # the Trainer's summary, of the steps since the resume
            row = {key: value for key, value in row.items() if not VARYING.search(key)}
            found.setdefault(f"log of step {row['step']}", []).append(row)
    return found


def say(repeat: Repeat, number: int) -> None:
    """A line for each repeat."""
    case = repeat.case
    outcome = f"differs in {', '.join(repeat.differs[:6])}" if repeat.differs else "identical"
    where = f"{case.stage} {case.quantization} {case.kept} #{number}"
    terminal.say(f"{where}: killed after {repeat.moment:.1f} s ({repeat.phase}): {outcome}")


def report(repeats: Sequence[Repeat], seconds: float) -> str:
    """The table in Markdown."""
    lines = [
        "# Stages killed at random moments and resumed",
        "",
        __doc__.partition("\n\n")[2].partition("\n\n")[2].strip(),
        "",
        "| stage | base | kills | before the first checkpoint | in training | after the last step | equal weights "
        "| equal in everything |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage, base in dict.fromkeys((r.case.stage, r.case.quantization) for r in repeats):
        some = [r for r in repeats if (r.case.stage, r.case.quantization) == (stage, base)]
        phases = Counter(r.phase for r in some)
        early = sum(n for phase, n in phases.items() if phase.startswith("loading"))
        late = phases["final evaluation"] + phases["the last words"]
        weights = sum(not any("safetensors" in d or "exit code" in d for d in r.differs) for r in some)
        equal = sum(not r.differs for r in some)
        name = {"none": "float32"}.get(base, base)
        lines.append(
            f"| {stage} | {name} | {len(some)} | {early} | {phases['training']} | {late} | {weights} of {len(some)} | "
            f"{equal} of {len(some)} |"
        )
    equal = sum(not r.differs for r in repeats)
    lines += [
        "",
        f"{equal} of {len(repeats)} are equal in everything that is compared. It took {seconds / 60:.0f} min.",
    ]
    for r in repeats:
        if r.differs:
            case = f"{r.case.stage} {r.case.quantization} {r.case.kept}"
            lines.append(f"- {case}, killed after {r.moment:.2f} s in {r.phase}: {', '.join(r.differs[:8])}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
