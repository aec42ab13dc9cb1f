"""Does the guard see over-optimization, and nothing else? By seed, on the embedded world: writes results/guard.md.

    python -m benchmarks.guard [runs_dir] [seed ...]

With `experiment=ppo_no_kl guard=gold guard.stop=true` it has to stop soon after the gold score has turned; with the
default KL penalty it must never fire. Finished stages are not made again.
"""

import json
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.turns import made_with
from rlhf_recipes import terminal

SEEDS = (0, 1, 2)
CASES = {"no_kl": ["experiment=ppo_no_kl"], "default": []}
GUARD = ["guard=gold", "guard.stop=true"]
RESULTS = Path(__file__).parent / "results" / "guard.md"


def main(runs_dir: str = "runs/guard", *seeds: str) -> None:
    """Make what is missing of all seeds, and write the table."""
    terminal.quiet()
    runs = Path(runs_dir)
    for seed in map(int, seeds or SEEDS):
        for stage in ("sft", "rm"):
            recipe(stage, f"run=seed{seed}", f"seed={seed}", f"runs_dir={runs}")
        for case, overrides in CASES.items():
            run = runs / f"seed{seed}_{case}"
            run.mkdir(exist_ok=True)
            for stage in ("sft", "rm"):
                if not (run / stage).exists():
                    (run / stage).symlink_to(Path("..") / f"seed{seed}" / stage)
            recipe("ppo", f"run={run.name}", f"seed={seed}", f"runs_dir={runs}", *overrides, *GUARD)
    RESULTS.write_text(report(runs))


def recipe(stage: str, *overrides: str) -> None:
    """Run a recipe, or skip it if it is finished."""
    subprocess.run([sys.executable, "-m", f"recipes.{stage}", *overrides], check=True)


def report(runs: Path) -> str:
    """The table in Markdown, of those seeds and cases that are finished."""
    stages = {
        (case, seed): stage
        for case in CASES
        for seed in SEEDS
        if ((stage := runs / f"seed{seed}_{case}" / "ppo") / "guard.json").exists()
    }
    manifest = json.loads((next(iter(stages.values())) / "manifest.json").read_text())
    guard = manifest["config"]["guard"]
    return "\n".join(
        [
            "# The guard on the embedded world",
            "",
            *made_with("guard", manifest),
            "",
            f"192 held-out prompts, {guard['samples']} samples of each, every "
            f"{manifest['config']['training']['eval_steps']:g} steps of at most 168 where the root of the KL has moved "
            f"by {guard['root_kl_step']}, else at every second such evaluation. `no_kl` is "
            f"`{' '.join(CASES['no_kl'] + GUARD)}`, `default` the default configuration with `{' '.join(GUARD)}`. The "
            "fall is that of the gold score under its best, at the last look; the largest fall is that of any look.",
            "",
            "| case | seed | fired at step | looks | best gold (step) | last gold | fall | largest fall (step) | "
            "reward, best to last | KL, best to last | kept (step) |",
            "|---" * 11 + "|",
            *(row(case, seed, stage) for (case, seed), stage in stages.items()),
            "",
        ]
    )


def row(case: str, seed: int, stage: Path) -> str:
    """A line of the table."""
    points: list[dict[str, Any]] = json.loads((stage / "guard.json").read_text())["points"]
    metrics = json.loads((stage / "metrics.json").read_text())
    best, last = max(points, key=lambda point: point["score"]), points[-1]
    tops = accumulate((point["score"] for point in points), max)
    deepest, at = max((top - point["score"], point["step"]) for top, point in zip(tops, points, strict=True))
    kept = next(point for point in points if point["step"] and point["score"] == metrics["guard"])
    cells = [
        case,
        str(seed),
        str(last["step"]) if metrics["stopped"] else "never",
        str(len(points)),
        f"{best['score']:.3f} ({best['step']})",
        f"{last['score']:.3f} ({last['step']})",
        f"{best['score'] - last['score']:.3f}",
        f"{deepest:.3f} ({at})",
        f"{best['reward']:.2f} to {last['reward']:.2f}",
        f"{best['kl']:.2f} to {last['kl']:.2f}",
        f"{kept['score']:.3f} ({kept['step']})",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(*sys.argv[1:])
