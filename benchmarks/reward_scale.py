"""Whether PPO depends on the reward's scale: writes benchmarks/results/reward_scale.md.

    python -m benchmarks.reward_scale [runs_dir]

The embedded world with reward and beta times 1, 20 and 1/20, which is one and the same objective: by the run's reward
model, from whose head the critic starts, and by the truth as a function, where the critic starts at zero. Finished
stages are not made again.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.turns import RESULTS, made_with, spread
from rlhf_recipes import terminal

SCALES = (1.0, 20.0, 0.05)
SEEDS = (0, 1)
STEPS = 80  # optimizer steps, two an iteration
BETA = 0.25  # the embedded world's
SOURCES = {"reward model": "reward", "function": "rlhf_recipes.guard.scorer:gold"}


def main(runs_dir: str = "runs/reward_scale") -> None:
    """Make what is missing, and write the table."""
    terminal.quiet()
    runs = Path(runs_dir).resolve()
    common = [f"runs_dir={runs}", "evaluation.samples=8"]
    for stage in ("sft", "rm"):
        recipe(stage, "run=base", *common)
    rows = []
    for source in SOURCES:
        for scale in SCALES:
            logs = [train(source, scale, seed, runs, common) for seed in SEEDS]
            rows.append(row(f"{source} | x {scale:g}", logs, scale))
    manifest = json.loads((runs / "base" / "rm" / "manifest.json").read_text())
    text = "\n".join(
        ["# The reward's scale", "", *made_with("reward_scale", manifest), "", *table(rows), "", *NOTES, ""]
    )
    print(text)
    (RESULTS / "reward_scale.md").write_text(text)


def train(source: str, scale: float, seed: int, runs: Path, common: Sequence[str]) -> list[dict[str, Any]]:
    """PPO by a source times a scale; the trainer's log."""
    name = f"{source.replace(' ', '-')}-{scale:g}-{seed}"
    if source == "function":
        reward = ["reward=function", f"reward.functions=[{{path: {SOURCES[source]}, weight: {scale}}}]"]
    else:
        reward = [f"reward.model={scaled(runs / 'base' / 'rm', scale, runs / 'adapters' / f'{scale:g}')}"]
    steps = {"max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false"}
    training = steps | {"beta": BETA * scale, "seed": seed}
    folder = runs / name
    shutil.copytree(runs / "base" / "sft", folder / "sft", dirs_exist_ok=True)
    recipe("ppo", f"run={name}", *common, *reward, *(f"training.{key}={value}" for key, value in training.items()))
    return [json.loads(line) for line in (folder / "ppo" / "log.jsonl").read_text().splitlines()]


def scaled(reward_model: Path, scale: float, folder: Path) -> Path:
    """A copy of a reward adapter whose scores are `scale` times as large."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json"):  # the manifest knows the scale
        shutil.copy(reward_model / name, folder)
    head = json.loads((reward_model / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(head | {"std": head["std"] / scale}))
    return folder


def recipe(stage: str, *options: str) -> None:
    """Run a recipe to its end."""
    subprocess.run([sys.executable, "-m", f"recipes.{stage}", *options], check=True)


def row(label: str, logs: Sequence[Sequence[dict[str, Any]]], scale: float) -> str:
    """What the second half of each training was like, by seed."""
    halves = [[entry for entry in log if "explained_variance" in entry] for log in logs]
    halves = [log[len(log) // 2 :] for log in halves]
    cells = [
        spread([fmean(entry["explained_variance"] for entry in half) for half in halves], 2),
        spread([fmean(entry["reward"] for entry in half) / scale for half in halves], 3),
        spread([fmean(entry["kl"] for entry in half) for half in halves], 2),
    ]
    return f"| {label} | {' | '.join(cells)} |"


def table(rows: Sequence[str]) -> list[str]:
    """All rows under their heads."""
    return ["| reward by | reward and beta | explained variance | reward / scale | KL, nats |", "|---" * 5 + "|", *rows]


NOTES = [
    f"- {STEPS} optimizer steps of the embedded default, seeds {', '.join(map(str, SEEDS))}; beta is {BETA:g} times "
    "the scale, and all else as it is.",
    "- Means of the second half of each training, on its own rollouts (lowest to highest of the seeds).",
]


if __name__ == "__main__":
    main(*sys.argv[1:])
