"""Which layers RM, DPO and PPO need to train, on the embedded world: writes benchmarks/results/trained_window.md.

    python -m benchmarks.trained_window [runs_dir] [seed ...]

Windows of layers, by seed, after equal episodes and after equal time; the time is taken at the end, in short runs one
after the other. Finished stages are not made again, so a broken-off benchmark goes on where it was.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset

from benchmarks.turns import RESULTS, processor, spread
from rlhf_recipes import data, evaluation, models, terminal, world
from rlhf_recipes.config import compose
from rlhf_recipes.roles import POLICY, Roles

SEEDS = (0, 1, 2)
WINDOWS = {  # shares of the layers that stay frozen, from the bottom and from the top
    "all": (0.0, 0.0),
    "upper half": (0.5, 0.0),
    "upper third": (0.67, 0.0),
    "upper sixth": (0.84, 0.0),
    "middle third": (0.34, 0.34),
}
DEFAULT = "upper half"
SAMPLES = 16  # of each held-out prompt, for the gold score
ITERATIONS = 12  # of the short runs that the time is taken in
PHASES = ("generate", "score", "reward", "value", "policy", "ptx")


@dataclass(frozen=True)
class Trained:
    """What one window came to with one seed."""

    sft: float  # gold score where it began
    accuracy: float  # of the reward model, on held-out pairs
    dpo: float  # gold
    steps: list[int]  # at which PPO was measured
    gold: list[float]  # by step
    reward: list[float]  # by step, by the window's own reward model

    def gold_after(self, steps: float) -> float | None:
        """Gold score after so many steps, linear between checkpoints; None beyond the last."""
        points = list(zip([0, *self.steps], [self.sft, *self.gold], strict=True))
        for (start, before), (end, after) in pairwise(points):
            if start <= steps <= end:
                return before + (after - before) * (steps - start) / (end - start)
        return None


def main(runs_dir: str = "runs/trained-window", *seeds: str) -> None:
    """Make what is missing of all windows and seeds, and write the table."""
    terminal.quiet()
    runs, chosen = Path(runs_dir), [int(seed) for seed in seeds] or SEEDS
    found: dict[str, list[Trained]] = {window: [] for window in WINDOWS}
    for seed in chosen:
        for window in WINDOWS:
            found[window].append(measure(runs, window, seed))
    seconds = {window: timed(runs, window, chosen[0]) for window in WINDOWS}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "trained_window.md").write_text(report(found, seconds))


def measure(runs: Path, window: str, seed: int) -> Trained:
    """All stages of one window and seed; what was measured is kept beside them."""
    name = f"seed{seed}-{window.replace(' ', '-')}"
    kept = runs / name / "window.json"
    if kept.exists():
        return Trained(**json.loads(kept.read_text()))
    first = runs / f"seed{seed}-{next(iter(WINDOWS))}" / "sft"  # SFT trains all layers, and so is the same for all
    if first.exists() and not (runs / name / "sft").exists():
        shutil.copytree(first, runs / name / "sft")
    options = overrides(runs, window, seed)
    own = {"ppo": ["training.save_total_limit=10", "training.load_best_model_at_end=false"]}
    for stage in ("sft", "rm", "dpo", "ppo"):
        subprocess.run([sys.executable, "-m", f"recipes.{stage}", *options, *own.get(stage, ())], check=True)
    cfg = compose("ppo", options)
    checkpoints = {
        int(folder.name.split("-")[1]): folder for folder in (runs / name / "ppo" / "checkpoints").glob("checkpoint-*")
    }
    steps = sorted(checkpoints)
    log = json.loads((checkpoints[steps[-1]] / "trainer_state.json").read_text())["log_history"]
    rewards = {entry["step"]: entry["eval_reward"] for entry in log if "eval_reward" in entry}
    trained = Trained(
        sft=gold(cfg, runs / name / "sft"),
        accuracy=json.loads((runs / name / "rm" / "metrics.json").read_text())["accuracy"][0],
        dpo=gold(cfg, runs / name / "dpo"),
        steps=steps,
        gold=[gold(cfg, checkpoints[step]) for step in steps],
        reward=[rewards[step] for step in steps],
    )
    kept.write_text(json.dumps(vars(trained)))
    return trained


def gold(cfg: Any, adapter: Path) -> float:
    """Gold score of an adapter on the held-out prompts."""
    asked = Dataset.from_list(data.load(cfg.data, "prompts", cfg.seed).test.to_list())
    tokenizer = models.load_tokenizer(cfg.model, asked)
    roles = Roles(models.load_policy(cfg, adapter), trunk=0)
    options = cfg.evaluation
    with roles.active(POLICY), torch.random.fork_rng():
        made = evaluation.sample(
            roles.model,
            tokenizer,
            asked,
            samples=SAMPLES,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            seed=cfg.seed,
        )
    verdicts = [world.gold(s.prompt, s.completion) for s in made]
    measured = {name: [getattr(v, name) for v in verdicts] for name in evaluation.GOLD}
    return evaluation.summarize(measured, SAMPLES)["gold"].mean


def overrides(runs: Path, window: str, seed: int) -> list[str]:
    """What all stages of a window and seed have in common."""
    name = f"seed{seed}-{window.replace(' ', '-')}"
    return [f"run={name}", f"seed={seed}", f"runs_dir={runs}", *layers(window)]


def layers(window: str) -> list[str]:
    """The overrides that make a window."""
    trunk, frozen_top = WINDOWS[window]
    return [f"trunk={trunk}", f"frozen_top={frozen_top}"]


def span(window: str, depth: int) -> str:
    """The layers of a window in a model of so many, counted from 1: `4 to 6`."""
    trunk, frozen_top = (int(share * depth) for share in WINDOWS[window])
    return f"{trunk + 1} to {depth - frozen_top}" if depth - frozen_top > trunk + 1 else f"{trunk + 1}"


def timed(runs: Path, window: str, seed: int) -> float:
    """Median seconds of a PPO iteration in which the policy trains, from a short run."""
    made, run = (runs / f"{prefix}seed{seed}-{window.replace(' ', '-')}" for prefix in ("", "time-"))
    for stage in ("sft", "rm"):
        if not (run / stage).exists():
            shutil.copytree(made / stage, run / stage)
    short = ["training.value_pretraining_passes=0", f"training.max_steps={2 * ITERATIONS}", "evaluation.prompts=0"]
    short += ["training.eval_strategy=no", "training.load_best_model_at_end=false", "training.logging_steps=2"]
    command = ["-m", "recipes.ppo", *overrides(runs, window, seed), f"run={run.name}", *short, "overwrite=true"]
    subprocess.run([sys.executable, *command], check=True)
    log = [json.loads(line) for line in (run / "ppo" / "log.jsonl").read_text().splitlines()]
    return median([sum(row.get(f"time/{phase}", 0.0) for phase in PHASES) for row in log if "time/policy" in row][1:])


def report(found: dict[str, list[Trained]], seconds: Mapping[str, float]) -> str:
    """The table in Markdown."""
    depth = models.read_config(compose("ppo", []).model).num_hidden_layers
    lines = []
    for window, trained in found.items():
        ratio = seconds[window] / seconds[DEFAULT]
        equal_time = [t.gold_after(t.steps[-1] / max(ratio, 1.0)) for t in trained]
        cells = [
            span(window, depth),
            spread([t.accuracy for t in trained], 3),
            spread([t.dpo - t.sft for t in trained], 3),
            spread([t.reward[-1] for t in trained], 2),
            spread([t.gold[-1] - t.sft for t in trained], 3),
            f"{ratio:.2f}",
            spread([g - t.sft for g, t in zip(equal_time, trained, strict=True) if g is not None], 3),
        ]
        lines.append(f"| {window} | " + " | ".join(cells) + " |")
    seeds = len(found[DEFAULT])
    end = found[DEFAULT][0].steps[-1]
    return "\n".join(
        [
            "# Which layers to train",
            "",
            f"`python -m benchmarks.trained_window`, {date.today()}, {processor()}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
            "",
            f"The embedded world's base has {depth} layers. SFT trains all; RM, DPO and PPO those of the row. Mean "
            f"over {seeds} seed{'s' * (seeds > 1)} (lowest to highest); gold scores are changes from SFT, with "
            f"{SAMPLES} samples of each of the held-out prompts.",
            "",
            "| window | layers | RM accuracy | DPO: gold | PPO: own reward | PPO: gold | PPO: time of an iteration | "
            "PPO: gold after equal time |",
            "|---" * 8 + "|",
            *lines,
            "",
            f"- PPO is measured after {end} steps; *equal time* is that of `{DEFAULT}` for all of them, between "
            f"checkpoints the gold score is read off a line, and a faster row has no more than its {end} steps.",
            "- Each row has a reward model of its own, so that *own reward* is on a scale of its own: compare the gold "
            "scores.",
            "",
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
