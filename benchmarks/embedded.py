"""What SFT, DPO and PPO reach on the embedded world, by seed: writes benchmarks/results/embedded.md.

    python -m benchmarks.embedded [runs_dir]

Finished stages are not made again, so a broken-off benchmark goes on where it was.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from benchmarks.turns import made_with
from rlhf_recipes import models, reward_model, terminal, world
from rlhf_recipes.config import compose

SEEDS = (0, 1, 2, 3, 4)
STAGES = ("sft", "rm", "dpo", "ppo")
MEASURES = ("gold", "helpful", "honest", "harmless", "KL to SFT", "length")
POLICIES = ("sft", "dpo", "ppo")
SAMPLES = 16  # of each held-out prompt, for the tables of the stages
COMPARED = 8  # samples of each held-out prompt, for win rates
RANKINGS = 12  # of each held-out prompt, to measure reward models on
RESULTS = Path(__file__).parent / "results" / "embedded.md"


def main(runs_dir: str = "runs/benchmark") -> None:
    """Make what is missing of all seeds, and write the table."""
    terminal.quiet()
    for seed in SEEDS:
        for stage in STAGES:
            options = [f"run=seed{seed}", f"seed={seed}", f"runs_dir={runs_dir}", f"evaluation.samples={SAMPLES}"]
            kept = ["training.save_total_limit=null"] if stage == "ppo" else []
            subprocess.run([sys.executable, "-m", f"recipes.{stage}", *options, *kept], check=True)
        policies = [*POLICIES, *map(str, checkpoints(Path(runs_dir), seed).values())]
        compared = [*options[:3], f"evaluation.samples={COMPARED}", f"eval.policies=[{','.join(policies)}]"]
        subprocess.run([sys.executable, "-m", "recipes.eval", *compared], check=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(report(Path(runs_dir)))


def checkpoints(runs: Path, seed: int) -> dict[int, Path]:
    """The folders of PPO's checkpoints, by step."""
    folders = (runs / f"seed{seed}" / "ppo" / "checkpoints").glob("checkpoint-*")
    return dict(sorted((int(folder.name.partition("-")[2]), folder) for folder in folders))


def report(runs: Path) -> str:
    """The table in Markdown, from the metrics and manifests of the runs."""
    lines, accuracy, looks = [], [], []
    for seed in SEEDS:
        metrics = {stage: json.loads((runs / f"seed{seed}" / stage / "metrics.json").read_text()) for stage in STAGES}
        for name, stage in (("sft", "sft"), ("dpo", "dpo"), ("change", "dpo"), ("ppo", "ppo"), ("change", "ppo")):
            figures = metrics[stage][name]
            label = f"{stage} - sft" if name == "change" else stage
            cells = [f"{figures[m][0]:.3f} ± {figures[m][1]:.3f}" for m in MEASURES]
            lines.append(f"| {seed} | {label} | " + " | ".join(cells) + " |")
        accuracy.append(reward_model_row(runs / f"seed{seed}", seed))
        log = [json.loads(line) for line in (runs / f"seed{seed}" / "ppo" / "log.jsonl").read_text().splitlines()]
        judged = json.loads((runs / f"seed{seed}" / "eval" / "metrics.json").read_text())["policies"]
        again = {step: judged[str(folder)] for step, folder in checkpoints(runs, seed).items()}
        looks += checkpoint_rows(seed, metrics["ppo"], log, again)
    manifest = json.loads((runs / "seed0" / "ppo" / "manifest.json").read_text())
    return "\n".join(
        [
            "# The embedded world",
            "",
            *made_with("embedded", manifest),
            "",
            f"192 held-out prompts, {SAMPLES} samples each at temperature 1; ± is half of the 95% interval over them.",
            "`gold` is the mean of helpful, honest and harmless. The changes are taken prompt by prompt.",
            "",
            "| seed | policy | " + " | ".join(MEASURES) + " |",
            "|---" * (len(MEASURES) + 2) + "|",
            *lines,
            "",
            *wins(runs),
            "The reward model against held-out raters, whose own noise is the ceiling:",
            "",
            "| seed | accuracy | ceiling | points below | calibration error | pairs |",
            "|---|---|---|---|---|---|",
            *accuracy,
            "",
            "The checkpoints that PPO looked at, on one sample of each held-out prompt; it keeps the best by them.",
            f"*Again*: measured on {COMPARED} other samples of each prompt. The KL is summed over the vocabulary; its",
            "interval is half of the 95% interval as a fraction of the KL.",
            "",
            "| seed | step | reward | KL to SFT | reward - beta x KL | kept | reward again | KL again | its interval | "
            "reward - beta x KL again | best again |",
            "|---" * 11 + "|",
            *looks,
            "",
        ]
    )


def checkpoint_rows(
    seed: int, metrics: Mapping[str, Any], log: Sequence[Mapping[str, Any]], again: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    """A line for each checkpoint that PPO looked at; the stage keeps the one whose objective is in its metrics.

    Args:
        again: by step, what `make eval` measures of it.
    """
    looks = [entry for entry in log if "eval_objective" in entry]
    beta = compose("ppo", []).training.beta
    objective = {step: of["reward"][0] - beta * of["KL to SFT"][0] for step, of in again.items()}
    lines = []
    for look in looks:
        step = int(look["step"])
        (kl, half_width), kept = again[step]["KL to SFT"], look["eval_objective"] == metrics["objective"]
        cells = [
            *(f"{look[key]:.3f}" for key in ("eval_reward", "eval_kl", "eval_objective")),
            "yes" if kept else "",
            f"{again[step]['reward'][0]:.3f}",
            f"{kl:.3f}",
            f"{half_width / kl:.1%}",
            f"{objective[step]:.3f}",
            "yes" if objective[step] == max(objective.values()) else "",
        ]
        lines.append(f"| {' | '.join([str(seed), str(step), *cells])} |")
    return lines


def wins(runs: Path) -> list[str]:
    """The table of `make eval`: against SFT by gold, and gold scores beside those of the best of n."""
    lines = []
    for seed in SEEDS:
        metrics = json.loads((runs / f"seed{seed}" / "eval" / "metrics.json").read_text())
        for row in metrics["win_rates"]:
            if row["judge"] == "gold":
                cells = [
                    "{:.1%} ({:.1%} to {:.1%})".format(*row["win_rate"]),
                    "{:.1%} ({:.1%} to {:.1%})".format(*row["length_controlled"]) if row["length_controlled"] else "-",
                    f"{row['ties']:.0%}",
                    "{:.1%} ({:.1%} to {:.1%})".format(*row["without_ties"]),
                    "{:.3f} ± {:.3f}".format(*metrics["policies"][row["policy"]]["gold"]),
                ]
                lines.append(f"| {seed} | {row['policy']} | " + " | ".join(cells) + " |")
    return [
        f"Against SFT by `make eval`, {COMPARED} samples of each prompt, the truth as judge, a tie counted as half:",
        "",
        "| seed | policy | wins | at equal length | ties | wins without ties | gold |",
        "|---" * 7 + "|",
        *lines,
        "",
    ]


def reward_model_row(run: Path, seed: int) -> str:
    """Accuracy of a run's reward model on rankings of the held-out prompts, many more than its recipe measures on."""
    rows = world.rankings(seed, held_out=RANKINGS)["test"]
    pairs = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in world.pairs(rows)])
    cfg = compose("rm", [f"seed={seed}"])
    tokenizer = models.load_tokenizer(cfg.model, pairs)
    model = models.load_reward_model(cfg, run / "sft")
    model.load_adapter(run / "rm", adapter_name="default")
    chosen, rejected = reward_model.pair_scores(
        model, reward_model.tokenize(pairs, tokenizer), tokenizer, batch_size=256
    )
    figures, ceiling = reward_model.agreement(chosen, rejected, pairs["prompt"]), world.ceiling(rows)
    mean, half_width = figures["accuracy"]
    return (
        f"| {seed} | {mean:.3f} ± {half_width:.3f} | {ceiling:.3f} | {100 * (ceiling - mean):.1f} | "
        f"{figures['calibration_error']:.3f} | {figures['pairs']:,} |"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
