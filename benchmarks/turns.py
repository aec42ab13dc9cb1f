"""Runs programs in turns, each in a process of its own under the probe, and writes tables of what they cost."""

import argparse
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PROBE = Path(__file__).parent / "probe.py"

CONSTRAINTS = "torch==2.13.0"
"""Of every rival's environment: the torch that the project is tested with."""

DTYPES = {"bfloat16": "bf16", "float32": "float32"}
"""What the weights of a base can be in, and what it is called in the tables."""


@dataclass(frozen=True)
class Contestant:
    """A tool in one setting: a row of the table."""

    label: str
    python: Path
    imports: Sequence[str]  # what its memory is counted from, `module:attribute`
    program: Callable[[Path, int], Sequence[str]]  # from the folder and the seed of a run: what python is to run
    environment: dict[str, str] | None = None
    rival: bool = True
    steps: int = 1  # optimizer steps of what counts as an iteration
    once: bool = False  # it runs in the first turn alone: a setting that is shown beside another row

    @property
    def slug(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"\W+", "-", self.label).strip("-").lower()


@dataclass(frozen=True)
class Probed:
    """What the probe noted of one run."""

    seconds: list[float]  # when each iteration ended
    rss: int  # MB, the peak less what imports took
    anonymous: int  # MB, likewise
    versions: dict[str, str]
    threads: int
    cpu_seconds: list[float] = field(default_factory=list)  # likewise, of all threads

    @classmethod
    def read(cls, folder: Path) -> "Probed":
        """From the folder of a run that ended well."""
        noted = json.loads((folder / "probe.json").read_text())
        rss, anonymous = (noted["peak"][kind] - noted["before"][kind] for kind in ("rss", "anonymous"))
        cpu = noted.get("cpu_seconds", [])
        return cls(noted["seconds"], rss, anonymous, noted["versions"], noted["threads"], cpu)


def options(
    name: str,
    description: str | None,
    *,
    task: bool = True,
    model: bool = True,
    turns: bool = True,
    judged: bool = False,
) -> argparse.Namespace:
    """The command line of a benchmark: `task` where it is the PPO task, whose length can be chosen; `model` where the
    model can be; `turns` where all of it runs several times; `judged` where there is no table without rewards."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if model:
        parser.add_argument(
            "--model",
            default="HuggingFaceTB/SmolLM2-135M-Instruct",
            help="hub id or folder of a causal LM with a ChatML tokenizer (default: %(default)s)",
        )
    if turns:
        parser.add_argument(
            "--turns",
            type=int,
            default=3,
            help="runs of each, with a seed each; rows of less weight run once (default: %(default)s)",
        )
    if task:
        parser.add_argument("--iterations", type=int, default=20, help="of 32 episodes (default: %(default)s)")
        parser.add_argument(
            "--snapshots",
            type=int,
            default=4,
            help="how often in a run its policy is kept, for the reward that it gets; 0: time and memory alone "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--only", default="", help="only the rows whose label this regular expression finds, for a trial"
        )
        parser.add_argument("--resume", action="store_true", help="keep the runs that are finished")
        parser.add_argument(
            "--busy", action="store_true", help="other work ran beside: CPU time alone, no wall time in the table"
        )
        parser.add_argument(
            "--judge",
            choices=("kept", "again"),
            help="run nothing: take the verdicts on the policies that lie in the cache, or judge them again",
        )
    parser.add_argument(
        "--cache",
        type=Path,
        default=REPOSITORY / ".bench",
        help="folder of the environments, the task and the runs (default: .bench in the repository)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights and of the arithmetic, for everybody (default: bfloat16 where this CPU multiplies it, "
        "else float32)",
    )
    chosen = parser.parse_args()
    chosen.dtype = chosen.dtype or cpu_dtype()
    if task and chosen.iterations < 2:
        parser.error("--iterations: the first is not timed, so at least 2")
    if judged and chosen.snapshots < 1:
        parser.error("--snapshots: this table is of rewards, so at least 1")
    chosen.cache = chosen.cache.resolve()
    return chosen


def cpu_dtype() -> str:
    """bfloat16 where this CPU has instructions for it; elsewhere it is many times slower than float32."""
    from rlhf_recipes.machine import multiplies_bf16

    return "bfloat16" if multiplies_bf16() else "float32"


def base_in(chosen: argparse.Namespace) -> str:
    """The folder of the model's weights in the dtype that was chosen: one that has to be converted is not mapped."""
    folder: Path = chosen.cache / "bases" / chosen.dtype / Path(chosen.model).name
    if not (folder / "ready").exists():  # written last: weights that were broken off are made again
        from transformers import AutoModelForCausalLM, AutoTokenizer

        AutoModelForCausalLM.from_pretrained(chosen.model, dtype=chosen.dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(chosen.model).save_pretrained(folder)
        (folder / "ready").touch()
    return str(folder)


def environment(cache: Path, name: str, requirements: Sequence[str]) -> Path:
    """The python of a rival's virtual environment, which is made unless it is there."""
    folder = cache / "environments" / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    logger.info("making the environment of %s in %s (some minutes)", name, folder)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(CONSTRAINTS)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "-c", str(constraints), *requirements]
    subprocess.run(pip, check=True)
    stamp.write_text(wanted)
    return python


def run(
    contestant: Contestant, folder: Path, seed: int = 0, *, snapshots: Sequence[int] = (), resume: bool = False
) -> int:
    """One turn: the program under the probe, its output in `log.txt`, its exit code in `exit.txt` and returned.

    Args:
        snapshots: the iterations after which the policy is written.
    """
    if resume and (folder / "exit.txt").exists():
        return int((folder / "exit.txt").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    probe = [PROBE, "--folder", folder, "--steps", contestant.steps, "--snapshots", ",".join(map(str, snapshots))]
    probe += ["--imports", ",".join(contestant.imports)]
    command = [str(part) for part in (contestant.python, *probe, "--", *contestant.program(folder, seed))]
    # the comparison is one of CPUs, also on a machine with a GPU
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    # a rival runs beside the repository, lest a folder of ours is taken for a package of its own
    cwd = folder if contestant.rival else REPOSITORY
    logger.info("%s, turn %d ...", contestant.label, seed + 1)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            command, cwd=cwd, env=variables | (contestant.environment or {}), stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode in (-signal.SIGTERM, -signal.SIGINT):  # no failure of the program's own
        raise SystemExit(f"{contestant.label} was ended from outside; go on with --resume")
    (folder / "exit.txt").write_text(str(done.returncode))
    return done.returncode


def probe(contestant: Contestant, runs: Path) -> Probed:
    """Run a program of ours once and read what it cost.

    Raises:
        RuntimeError: it failed; its log is named.
    """
    folder = runs / contestant.slug
    if run(contestant, folder):
        raise RuntimeError(f"{contestant.label} failed; see {folder / 'log.txt'}")
    return Probed.read(folder)


def error_line(log: str) -> str | None:
    """The first line of the last error in a log."""
    found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .*", log, flags=re.MULTILINE)
    return found[-1] if found else None


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and range over the turns: `0.57 (0.56 to 0.59)`; values that are missing are left out."""
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    mean, low, high = (f"{value:.{digits}f}" for value in (fmean(there), min(there), max(there)))
    return mean if low == high else f"{mean} ({low} to {high})"


def made_with(name: str, manifest: Mapping[str, Any]) -> list[str]:
    """The first lines of a report on stages: what was run, when, and on what, by the manifest of one of them."""
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    return [
        f"`python -m benchmarks.{name}`, {date.today()}, {manifest['device']}, {manifest['platform']}.",
        f"Versions: {versions}.",
    ]


def header(title: str, name: str, chosen: argparse.Namespace, probed: Probed | None) -> list[str]:
    """The first lines of a report: what was run, when, in which dtype, and on what."""
    given = {key: getattr(chosen, key) for key in ("iterations", "snapshots", "turns", "dtype") if key in chosen}
    busy = ["--busy"] if getattr(chosen, "busy", False) else []
    command = " ".join([f"python -m benchmarks.{name}", *(f"--{key} {value}" for key, value in given.items()), *busy])
    threads = probed.threads if probed else "?"
    device = f"{processor()}, {threads} threads, {platform.system()} {platform.machine()}"
    packages = ", ".join(f"{p} {v}" for p, v in probed.versions.items()) if probed else "?"
    return [
        f"# {title}, in {DTYPES[chosen.dtype]}",
        "",
        f"`{command}`, {Path(chosen.model).name} in {DTYPES[chosen.dtype]}, {date.today()}, {device}.",
        "",
        f"Ours: {packages}.",
        "",
    ]


def write(name: str, lines: Sequence[str], dtype: str = "bfloat16") -> None:
    """Print a report, and write it to benchmarks/results."""
    logger.info("%s", "\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{named(name, dtype)}.md").write_text("\n".join([*lines, ""]))


def named(name: str, dtype: str) -> str:
    """What the files of a benchmark's results are called, without suffix: <name>, or <name>_float32."""
    return f"{name}_float32" if dtype == "float32" else name


def processor() -> str:
    """The CPU's name, as Linux has it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()
