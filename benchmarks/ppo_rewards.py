"""The reward that each tool's PPO has after equal episodes, and its KL: writes benchmarks/results/ppo_rewards.md.

    python -m benchmarks.ppo_rewards [--model <folder or hub id>] [--dtype float32]

The task of ppo_vs_llamafactory, ppo_vs_swift and ppo_vs_trl, with three seeds of everybody. Nothing is timed here: the
machine may do other things meanwhile.
"""

import logging
from collections.abc import Mapping, Sequence

from benchmarks import ppo_task, ppo_vs_llamafactory, ppo_vs_swift, ppo_vs_trl
from benchmarks.ppo_task import EPISODES, KL_COEFFICIENT
from benchmarks.ppo_turns import Failure, Run, compete, ours, publish, reward_line, task_line
from benchmarks.turns import DTYPES, environment, header, options, spread

NAME = "ppo_rewards"


def main() -> None:
    """Run everybody in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__, judged=True)
    short, n = DTYPES[chosen.dtype], chosen.iterations
    rivals = {"llamafactory": ppo_vs_llamafactory, "swift": ppo_vs_swift, "trl": ppo_vs_trl}
    pythons = {name: environment(chosen.cache, name, rival.REQUIREMENTS) for name, rival in rivals.items()}
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    ppo_vs_llamafactory.translate(task, n)
    contestants = [
        ours(task, n, "ours"),
        ppo_vs_llamafactory.llamafactory(task, n, pythons["llamafactory"], "LLaMA-Factory", checkpointing=False),
        ppo_vs_swift.swift(task, n, pythons["swift"], "ms-swift", rollout=32),
        ppo_vs_trl.trl(task, n, pythons["trl"], "TRL", rollout=32),
        ours(task, n, f"ours, nf4 in {short}", "quantization=nf4"),
        ours(task, n, "ours, critic in one pass", "training.value_num_iterations=1"),
    ]
    results = compete(contestants, task, chosen, NAME)
    first = next((turn for turns in results.values() for turn in turns if isinstance(turn, Run)), None)
    head = header("Reward after equal episodes", NAME, chosen, first)
    publish(NAME, [*head, *table(results), "", task_line(chosen), reward_line(), *NOTES], chosen)


def table(results: Mapping[str, Sequence[Run | Failure]]) -> list[str]:
    """One row for each tool: the reward after each number of iterations after which its policy was kept, and what it
    cost in KL at the end."""
    runs = {label: [turn for turn in turns if isinstance(turn, Run)] for label, turns in results.items()}
    kept = sorted({iteration for turns in runs.values() for run in turns for iteration in run.verdicts})
    rewards = [f"reward after {iteration * EPISODES} episodes" for iteration in kept]
    columns = ["", *rewards, "KL at the end, nats", f"reward - {KL_COEFFICIENT:g} KL", "turns"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label, turns in runs.items():
        ends = [run.verdicts[kept[-1]] for run in turns]
        cells = [
            *(spread([run.rewards.get(iteration) for run in turns], 2) for iteration in kept),
            spread([end.kl for end in ends], 2),
            spread([end.objective for end in ends], 2),
        ]
        lines.append(f"| {label} | {' | '.join(cells)} | {len(turns)} of {len(results[label])} |")
    return lines


NOTES = [
    "- Mean over the turns (lowest to highest), each with a seed of its own, the same for everybody.",
    "- **KL** to the base, of the same answers. With one KL coefficient for all, reward less KL is what all tools "
    "maximize.",
    "- Our critic warms up in up to four iterations, in which our policy rests; they count as episodes here.",
]


if __name__ == "__main__":
    main()
