"""Which layers RM, DPO and PPO need to train, on the embedded world: writes benchmarks/results/trained_window.md.

    python -m benchmarks.trained_window [runs_dir]

Windows of layers, by seed, after equal episodes and after equal time. Finished stages are not made again, so a
broken-off benchmark goes on where it was.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import fmean
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
PHASES = ("generate", "score", "reward", "value", "policy", "ptx")


@dataclass(frozen=True)
class Trained:
    """What one window came to with one seed."""

    sft: float  # gold score where it began
    accuracy: float  # of the reward model, on held-out pairs
    dpo: float  # gold
    seconds: float  # of a PPO iteration in which the policy trains
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


def main(runs_dir: str = "runs/trained-window") -> None:
    """Make what is missing of all windows and seeds, and write the table."""
    terminal.quiet()
    found: dict[str, list[Trained]] = {window: [] for window in WINDOWS}
    for seed in SEEDS:
        for window in WINDOWS:
            found[window].append(measure(Path(runs_dir), window, seed))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "trained_window.md").write_text(report(found))


def measure(runs: Path, window: str, seed: int) -> Trained:
    """All stages of one window and seed; what was measured is kept beside them."""
    name = f"seed{seed}-{window.replace(' ', '-')}"
    kept = runs / name / "window.json"
    if kept.exists():
        return Trained(**json.loads(kept.read_text()))
    first = runs / f"seed{seed}-{next(iter(WINDOWS))}" / "sft"  # SFT trains all layers, and so is the same for all
    if first.exists() and not (runs / name / "sft").exists():
        shutil.copytree(first, runs / name / "sft")
    trunk, frozen_top = WINDOWS[window]
    options = [f"run={name}", f"seed={seed}", f"runs_dir={runs}", f"trunk={trunk}", f"frozen_top={frozen_top}"]
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
        seconds=seconds(log),
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


def seconds(log: Sequence[dict[str, Any]]) -> float:
    """Mean seconds of a PPO iteration, of those in the second half, when the policy trains."""
    timed = [sum(entry.get(f"time/{phase}", 0.0) for phase in PHASES) for entry in log if "time/policy" in entry]
    return fmean(timed[len(timed) // 2 :])


def report(found: dict[str, list[Trained]]) -> str:
    """The table in Markdown."""
    layers = models.read_config(compose("ppo", []).model).num_hidden_layers
    lines = []
    for window, trained in found.items():
        trunk, frozen_top = (int(share * layers) for share in WINDOWS[window])
        times = [t.seconds / d.seconds for t, d in zip(trained, found[DEFAULT], strict=True)]
        equal_time = [t.gold_after(t.steps[-1] / ratio) for t, ratio in zip(trained, times, strict=True)]
        cells = [
            f"{trunk + 1} to {layers - frozen_top}" if layers - frozen_top > trunk + 1 else f"{trunk + 1}",
            spread([t.accuracy for t in trained], 3),
            spread([t.dpo - t.sft for t in trained], 3),
            spread([t.reward[-1] for t in trained], 2),
            spread([t.gold[-1] - t.sft for t in trained], 3),
            spread(times, 2),
            spread([g - t.sft for g, t in zip(equal_time, trained, strict=True) if g is not None], 3),
        ]
        lines.append(f"| {window} | " + " | ".join(cells) + " |")
    end = found[DEFAULT][0].steps[-1]
    return "\n".join(
        [
            "# Which layers to train",
            "",
            f"`python -m benchmarks.trained_window`, {date.today()}, {processor()}, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}.",
            "",
            f"The embedded world's base has {layers} layers. SFT trains all; RM, DPO and PPO those of the row. Means "
            f"over {len(SEEDS)} seeds (lowest to highest); gold scores are changes from SFT, with {SAMPLES} samples of "
            "each of the held-out prompts.",
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
