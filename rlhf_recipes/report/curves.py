"""Curves of each stage over its steps, from what its trainer logged."""

from __future__ import annotations

from itertools import groupby

from rlhf_recipes.report import plots
from rlhf_recipes.report.content import Block, Key, Plot, Plots, Text
from rlhf_recipes.report.palette import hue, step
from rlhf_recipes.report.reading import Run, Trained, finite

# What is drawn: title, unit, and the log's name for it; held-out figures have the same names after `eval_`.
CURVES = (
    ("Loss", "", "loss"),
    ("Reward", "", "reward"),
    ("Reward less KL penalty", "", "reward_with_kl"),
    ("Objective", "reward less beta x KL", "objective"),
    ("KL to the reference", "nats", "kl"),
    ("KL coefficient", "", "kl_coef"),
    ("Entropy", "nats per token", "entropy"),
    ("Completion length", "tokens", "completions/mean_length"),
    ("Answers that end", "share", "eos_share"),
    ("Right next tokens", "share", "mean_token_accuracy"),
    ("Pairs in the right order", "share", "accuracy"),
    ("Pairs in the right order", "share", "rewards/accuracies"),
    ("Margin", "chosen less rejected", "margin"),
    ("Margin", "chosen less rejected", "rewards/margins"),
    ("Value loss", "", "value_loss"),
    ("Explained variance", "share", "explained_variance"),
    ("Clipped tokens", "share", "clip_ratio/region_mean"),
    ("Learning rate", "", "learning_rate"),
    ("Gradient norm", "", "grad_norm"),
)
NOISY = 30
"""Points beyond which a running mean is drawn over the values themselves."""


def curves(run: Run) -> list[Block]:
    """Small plots for each stage; the jobs of a sweep are drawn into the same ones."""
    blocks: list[Block] = []
    for stage, grouped in groupby((trained for trained in run.stages if trained.log), lambda trained: trained.stage):
        jobs = list(grouped)
        sweep = [job.name for job in jobs if "/" in job.name]
        hues = {job.name: hue(job.name) for job in jobs} | {n: step(i, len(sweep)) for i, n in enumerate(sweep)}
        drawn = [plot for title, unit, key in CURVES if (plot := _plot(jobs, hues, title, unit, key))]
        if drawn:
            steps = max(row["step"] for job in jobs for row in job.log)
            blocks.append(Text(f"{steps:,} optimizer steps.", stage, hue(stage)))
            blocks += [Key([*hues.items()])] if len(jobs) > 1 else []
            blocks.append(Plots(drawn))
    if blocks:
        blocks.insert(0, Text("Solid: training, smoothed over the single values. Dashed: held-out prompts or rows."))
    return blocks


def _plot(jobs: list[Trained], hues: dict[str, str], title: str, unit: str, key: str) -> Plot | None:
    found = []
    for job in jobs:
        trained, heldout = _points(job, key), _points(job, f"eval_{key}")
        if len(trained) > NOISY:
            if len(jobs) == 1:
                found.append(plots.Line("", hues[job.name], trained, faint=True))
            trained = plots.smooth(trained)
        found += [plots.Line("", hues[job.name], trained)] if trained else []
        found += [plots.Line("", hues[job.name], heldout, dashed=True, marker="o")] if heldout else []
    if all(len(line.points) < 2 for line in found):
        return None
    name, missing = (
        f"{jobs[0].stage}-{key}",
        sum(job_row[key] is None for job in jobs for job_row in job.log if key in job_row),
    )
    caption = f"{unit}{', ' * bool(unit)}no number at {missing:,} steps" if missing else unit
    return Plot(plots.lines(name, found, x="step", y="", small=True), title, caption, small=True)


def _points(job: Trained, key: str) -> list[plots.Point]:
    """The values of a figure by step, where the log has it."""
    values = {row["step"]: value for row in job.log if (value := finite(row.get(key))) is not None}
    return [(float(at), value, None) for at, value in values.items()]
