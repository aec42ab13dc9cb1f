"""The reward that each tool's PPO buys with its KL, as a curve: writes benchmarks/results/ppo_rewards.md and .svg.

    python -m benchmarks.ppo_rewards [--model <folder or hub id>] [--dtype float32]
    python -m benchmarks.ppo_rewards --judge again      # train nothing: judge the policies that were kept

The task of ppo_vs_llamafactory, ppo_vs_swift and ppo_vs_trl, with three seeds of everybody. Wall time is not in it, so
the machine may do other things meanwhile: equal time is equal CPU time, of one thread each (OMP_NUM_THREADS=1).
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from benchmarks import ppo_task, ppo_vs_llamafactory, ppo_vs_swift, ppo_vs_trl, turns
from benchmarks.ppo_task import EPISODES, KL_COEFFICIENT
from benchmarks.ppo_turns import TRAINED, Failure, Run, compete, ours, publish, reward_line, task_line
from benchmarks.turns import environment, header, options, spread
from rlhf_recipes.evaluation.intervals import interval

NAME = "ppo_rewards"
DEFAULT = "ours, upper half"


def main() -> None:
    """Run everybody in turns, judge what they kept, and write the tables and the curves."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__, judged=True)
    n = chosen.iterations
    rivals = {"llamafactory": ppo_vs_llamafactory, "swift": ppo_vs_swift, "trl": ppo_vs_trl}
    pythons = {name: environment(chosen.cache, name, rival.REQUIREMENTS) for name, rival in rivals.items()}
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    if not chosen.judge:
        ppo_vs_llamafactory.translate(task, n)
    contestants = [
        ours(task, n, DEFAULT),
        ours(task, n, "ours, all layers", "trunk=0"),
        ppo_vs_llamafactory.llamafactory(task, n, pythons["llamafactory"], "LLaMA-Factory", checkpointing=False),
        ppo_vs_swift.swift(task, n, pythons["swift"], "ms-swift", rollout=32),
        ppo_vs_trl.trl(task, n, pythons["trl"], "TRL", rollout=32),
    ]
    results = compete(contestants, task, chosen, NAME)
    runs = {label: [turn for turn in of if isinstance(turn, Run)] for label, of in results.items()}
    first = next((run for of in runs.values() for run in of), None)
    head = header("Reward and KL after equal episodes", NAME, chosen, first)
    picture = f"{turns.named(NAME, chosen.dtype)}.svg"
    draw(runs, turns.RESULTS / picture)
    lines = [
        *head,
        *table(results),
        "",
        f"![Reward against the KL to the base, for each tool]({picture})",
        "",
        *curves(runs),
        "",
        task_line(chosen),
        reward_line(),
        *NOTES,
    ]
    publish(NAME, lines, chosen)


def table(results: Mapping[str, Sequence[Run | Failure]]) -> list[str]:
    """One row for each tool: what it has at the end, at two KLs that every run came to, and in the time of ours."""
    runs = {label: [turn for turn in of if isinstance(turn, Run)] for label, of in results.items()}
    end = max(iteration for of in runs.values() for run in of for iteration in run.verdicts)
    shared = min(max(verdict.kl for verdict in run.verdicts.values()) for of in runs.values() for run in of)
    own = runs.get(DEFAULT, [])
    kls = [0.05 * int(part * shared / 0.05) for part in (0.5, 1.0)]
    columns = [
        *("", f"reward after {end * EPISODES} episodes", "KL, nats", "KL by k3", f"reward - {KL_COEFFICIENT:g} KL"),
        *(f"reward at a KL of {kl:.2f}" for kl in kls),
        *("CPU time of an episode, x ours", "reward in our time", "turns"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label, of in runs.items():
        ends = [run.verdicts[end] for run in of]
        # a row that ran once is compared with our first turn alone
        beside = list(zip(of, own, strict=False))
        slower = fmean(a.cpu_seconds_per_episode / b.cpu_seconds_per_episode for a, b in beside) if beside else None
        objective = interval([verdict.objective for verdict in ends])
        cells = [
            spread([verdict.reward for verdict in ends], 2),
            spread([verdict.kl for verdict in ends], 2),
            spread([verdict.k3 for verdict in ends], 2),
            f"{objective.mean:.2f} ± {objective.half_width:.2f}",
            *(spread([reward_at(run, kl) for run in of], 2) for kl in kls),
            f"{slower:.2f}" if slower else "-",
            spread([reward_after(run, end / max(slower, 1.0)) for run in of] if slower else [], 2),
            f"{len(of)} of {len(results[label])}",
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def curves(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """One row for each tool: reward and KL at every snapshot, means over the turns."""
    kept = sorted({iteration for of in runs.values() for run in of for iteration in run.verdicts})
    columns = ["reward (KL) after episodes", *(str(iteration * EPISODES) for iteration in kept)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label, of in runs.items():
        cells = []
        for iteration in kept:
            there = [run.verdicts[iteration] for run in of if iteration in run.verdicts]
            mean = "{:.2f} ({:.2f})"
            cells.append(mean.format(fmean(v.reward for v in there), fmean(v.kl for v in there)) if there else "-")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def reward_at(run: Run, kl: float) -> float | None:
    """Reward where the run first comes to a KL, linear in its root between snapshots; None where it never does."""
    points = [verdict for _, verdict in sorted(run.verdicts.items())]
    for before, after in pairwise(points):
        if before.kl <= kl <= after.kl:
            start, end = max(before.kl, 0.0) ** 0.5, after.kl**0.5
            part = (kl**0.5 - start) / (end - start) if end > start else 1.0
            return before.reward + part * (after.reward - before.reward)
    return None


def reward_after(run: Run, iterations: float) -> float | None:
    """Reward after so many iterations, linear between snapshots."""
    for (start, before), (end, after) in pairwise(sorted(run.rewards.items())):
        if start <= iterations <= end:
            return before + (after - before) * (iterations - start) / (end - start)
    return None


def draw(runs: Mapping[str, Sequence[Run]], file: Path) -> None:
    """Reward against the KL, on an axis that goes with its root: the mean of each tool's turns; each turn faintly."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (label, of) in enumerate(runs.items()):
        paths = [[(verdict.kl, verdict.reward) for _, verdict in sorted(run.verdicts.items())] for run in of]
        for path in paths:
            axes.plot(*zip(*path, strict=True), color=f"C{i}", alpha=0.25, linewidth=0.8)
        means = [[fmean(values) for values in zip(*points, strict=True)] for points in zip(*paths, strict=True)]
        if means:
            axes.plot(*zip(*means, strict=True), color=f"C{i}", marker=".", label=label)
    axes.set_xscale("function", functions=(_root, _square))
    axes.set_xlim(left=0)
    axes.set(xlabel="KL to the base, nats per completion", ylabel="reward on held-out prompts")
    axes.legend()
    figure.savefig(file, metadata={"Date": None})


def _root(x):  # type: ignore[no-untyped-def]
    return abs(x) ** 0.5


def _square(x):  # type: ignore[no-untyped-def]
    return x**2


NOTES = [
    f"{TRAINED} LLaMA-Factory's critic is a head on the policy; everybody else's has LoRA weights of its own.",
    "- Mean over the turns (lowest to highest), each with a seed of its own; ± is half of the 95% interval over seeds.",
    "- **KL** to the base, of the same completions: the sum over the vocabulary at every position. *By k3*: its "
    "estimate from the sampled tokens, whose tail is heavy. With one KL coefficient for all, reward less KL is what "
    "all tools maximize.",
    "- **At a KL**: where a run first comes to it, linear in the KL's root between snapshots. **In our time**: after "
    "as many episodes as the tool makes in the CPU time of our default row (without the first iteration), linear "
    "between snapshots; a faster row has no more than its own episodes.",
]


if __name__ == "__main__":
    main()
