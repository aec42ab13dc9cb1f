"""What SFT, DPO and PPO reach on the embedded world, by seed: writes benchmarks/results/embedded.md.

    python -m benchmarks.embedded [runs_dir]

Finished stages are not made again, so a broken-off benchmark goes on where it was.
"""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

from rlhf_recipes import world

SEEDS = (0, 1, 2)
STAGES = ("sft", "rm", "dpo", "ppo")
MEASURES = ("gold", "helpful", "honest", "harmless", "KL to SFT", "length")
RESULTS = Path(__file__).parent / "results" / "embedded.md"


def main(runs_dir: str = "runs/benchmark") -> None:
    """Make what is missing of all seeds, and write the table."""
    for seed in SEEDS:
        for stage in STAGES:
            options = [f"run=seed{seed}", f"seed={seed}", f"runs_dir={runs_dir}", "evaluation.samples=64"]
            subprocess.run([sys.executable, "-m", f"recipes.{stage}", *options], check=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(Path(runs_dir)))


def report(runs: Path) -> str:
    """The table in Markdown, from the metrics and manifests of the runs."""
    lines, accuracy = [], []
    for seed in SEEDS:
        metrics = {stage: json.loads((runs / f"seed{seed}" / stage / "metrics.json").read_text()) for stage in STAGES}
        for name, stage in (("sft", "sft"), ("dpo", "dpo"), ("change", "dpo"), ("ppo", "ppo"), ("change", "ppo")):
            figures = metrics[stage][name]
            label = f"{stage} - sft" if name == "change" else stage
            cells = [f"{figures[m][0]:.3f} ± {figures[m][1]:.3f}" for m in MEASURES]
            lines.append(f"| {seed} | {label} | " + " | ".join(cells) + " |")
        rm = metrics["rm"]
        ceiling = world.ceiling(world.rankings(seed)["test"])
        accuracy.append(
            f"| {seed} | {rm['accuracy'][0]:.3f} | {ceiling:.3f} | {rm['calibration_error']:.3f} | {rm['pairs']:,} |"
        )
    manifest = json.loads((runs / "seed0" / "ppo" / "manifest.json").read_text())
    versions = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    return "\n".join(
        [
            "# The embedded world",
            "",
            f"`python -m benchmarks.embedded`, {date.today()}, {manifest['device']}, {manifest['platform']}.",
            f"Versions: {versions}.",
            "",
            "192 held-out prompts, 64 samples each at temperature 1; ± is half of the 95% interval over prompts.",
            "`gold` is the mean of helpful, honest and harmless. The changes are taken prompt by prompt.",
            "",
            "| seed | policy | " + " | ".join(MEASURES) + " |",
            "|---" * (len(MEASURES) + 2) + "|",
            *lines,
            "",
            "The reward model against held-out raters, whose own noise is the ceiling:",
            "",
            "| seed | accuracy | ceiling | calibration error | pairs |",
            "|---|---|---|---|---|",
            *accuracy,
            "",
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
