"""Which layers RM, DPO and PPO need to train, on a pretrained model.

    python -m benchmarks.trained_window_pretrained [--model <folder or hub id>] [--dtype float32]

Writes benchmarks/results/trained_window_pretrained.md: the windows of benchmarks.trained_window on the task of
benchmarks.ppo_vs_llamafactory. PPO is given the same reward in every row, that of a reward model whose own window is
the upper sixth, so that it stands on every row's trunk; all policies are judged by another one.
"""

import json
import logging
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks import ppo_task
from benchmarks.ppo_task import EPISODES, Task, Verdict, train_on_rankings
from benchmarks.ppo_turns import Failure, Run, compete, ours, publish, task_line
from benchmarks.trained_window import DEFAULT, WINDOWS, layers, span
from benchmarks.turns import header, options, spread

NAME = "trained_window_pretrained"
REWARD = "upper sixth"


@dataclass(frozen=True)
class Window:
    """What one window came to, by turn."""

    accuracy: list[float]  # of its reward model, on held-out pairs
    dpo: list[Verdict]
    ppo: list[Run]


def main() -> None:
    """Train everything in every window, judge it, and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__, judged=True)
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    runs = chosen.cache / "runs" / NAME / chosen.dtype
    trained = {
        stage: {
            window: [stage_of(stage, task, runs, window, seed, chosen.resume) for seed in range(chosen.turns)]
            for window in WINDOWS
        }
        for stage in ("rm", "dpo")
    }
    reward = f"reward.model={trained['rm'][REWARD][0]}"
    contestants = [ours(task, chosen.iterations, window, *layers(window), reward) for window in WINDOWS]
    ppo = compete(contestants, task, chosen, NAME)
    judge = ppo_task.Judge(task)
    found = {
        window: Window(
            accuracy=[json.loads((made / "metrics.json").read_text())["accuracy"][0] for made in trained["rm"][window]],
            dpo=[judge.verdict(made / "adapter_model.safetensors") for made in trained["dpo"][window]],
            ppo=[succeeded(window, turn) for turn in turns],
        )
        for window, turns in ppo.items()
    }
    depth = json.loads((task.base / "config.json").read_text())["num_hidden_layers"]
    head = header("Which layers to train", NAME, chosen, found[DEFAULT].ppo[0])
    publish(
        NAME,
        [*head, *table(found, chosen.iterations, depth), "", *notes(chosen, found[DEFAULT].ppo[0].rewards[0], depth)],
        chosen,
    )


def stage_of(stage: str, task: Task, runs: Path, window: str, seed: int, resume: bool) -> Path:
    """Folder of what RM or DPO made in a window."""
    folder = runs / stage / window.replace(" ", "-") / str(seed)
    again = [] if resume else ["overwrite=true"]
    return train_on_rankings(stage, task, folder, *layers(window), f"training.seed={seed}", *again)


def succeeded(window: str, turn: Run | Failure) -> Run:
    """The run.

    Raises:
        RuntimeError: it failed.
    """
    if isinstance(turn, Failure):
        raise RuntimeError(f"PPO in the window '{window}' failed: {turn.message}")
    return turn


def table(found: Mapping[str, Window], iterations: int, depth: int) -> list[str]:
    """A line for each window."""
    columns = [
        *("window", "layers", "RM accuracy", "DPO: reward", "DPO: KL"),
        *(f"PPO: reward after {EPISODES * n} episodes" for n in kept(found)),
        *("PPO: KL", "s / episode", "x default", "PPO: reward after equal time", "peak RSS, MB"),
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    default = found[DEFAULT].ppo
    for name, window in found.items():
        seconds = [run.seconds_per_episode for run in window.ppo]
        ratio = fmean(seconds) / fmean(run.seconds_per_episode for run in default)
        equal_time = [
            run.rewards[iterations] if ratio <= 1 else run.reward_after(other.trained(iterations))
            for run, other in zip(window.ppo, default, strict=True)
        ]
        cells = [
            span(name, depth),
            spread(window.accuracy, 3),
            spread([verdict.reward for verdict in window.dpo], 2),
            spread([verdict.kl for verdict in window.dpo], 1),
            *(spread([run.rewards[n] for run in window.ppo], 2) for n in kept(found)),
            spread([run.verdicts[iterations].kl for run in window.ppo], 2),
            *(spread(seconds, 3), f"{ratio:.2f}", spread(equal_time, 2)),
            spread([float(run.rss) for run in window.ppo], 0),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def kept(found: Mapping[str, Window]) -> list[int]:
    """The iterations after which the policies were judged."""
    return sorted(set(found[DEFAULT].ppo[0].rewards) - {0})


def notes(chosen: Namespace, start: float, depth: int) -> list[str]:
    """What the columns mean."""
    return [
        task_line(chosen),
        f"- The model has {depth} layers. There is no SFT stage; RM, DPO and PPO train those of the row.",
        f"- PPO is given another reward in its stead, that of the reward model of `{REWARD}`, in every row. *Reward* "
        "is that of the task's reward model, which no row trains against, of "
        f"{ppo_task.HELD_OUT} held-out prompts with {ppo_task.SAMPLES} samples each; the base has {start:.2f}. *KL* is "
        "that to the base, in nats an answer.",
        f"- *Equal time* is that of `{DEFAULT}` for all its episodes; between snapshots the reward is read off a line, "
        "and a faster row has no more than its own episodes.",
    ]


if __name__ == "__main__":
    main()
