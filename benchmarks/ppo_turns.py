"""Our PPO and others on the common task, in turns: what they cost, and the reward that they reached."""

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import ppo_task
from benchmarks.ppo_task import EPISODES, STEPS, Task, Verdict
from benchmarks.turns import DTYPES, Contestant, Probed, error_line, header, run, spread, write

logger = logging.getLogger(__name__)

SKIPPED = 1
"""Iterations that the timing leaves out: the first holds the loading, and in ours the pretraining of the critic."""

CPU_SECONDS = "CPU s / episode"

TRAINED = """\
- **Trained**: LoRA in all layers, by policy and critic; where the row says so, in the upper half of them. Our critic
  trains in the first of the two passes, and in four over the first iteration before the policy's first step."""


@dataclass(frozen=True)
class Run(Probed):
    """One turn of one contestant."""

    verdicts: dict[int, Verdict] = field(default_factory=dict)  # on held-out prompts, by iteration; 0 is the base

    @property
    def rewards(self) -> dict[int, float]:
        """By iteration."""
        return {iteration: verdict.reward for iteration, verdict in self.verdicts.items()}

    @property
    def seconds_per_episode(self) -> float:
        """Mean over the iterations that count."""
        return self._per_episode(self.seconds)

    @property
    def cpu_seconds_per_episode(self) -> float:
        """Likewise, of all threads."""
        return self._per_episode(self.cpu_seconds) if self.cpu_seconds else float("nan")

    def _per_episode(self, ends: Sequence[float]) -> float:
        first = min(SKIPPED, len(ends) - 1)
        return (ends[-1] - ends[first - 1]) / (len(ends) - first) / EPISODES

    def trained(self, iteration: int) -> float:
        """Seconds of training up to the end of an iteration; the first counts as the mean of those that are timed."""
        if iteration == 0:
            return 0.0
        return self.seconds[iteration - 1] - self.seconds[0] + self.seconds_per_episode * EPISODES

    def reward_after(self, seconds: float) -> float | None:
        """Reward after so many seconds of training, linear between snapshots; None where the run was shorter."""
        points = [(self.trained(iteration), reward) for iteration, reward in sorted(self.rewards.items())]
        for (start, before), (end, after) in pairwise(points):
            if start <= seconds <= end:
                return before + (after - before) * (seconds - start) / (end - start)
        return None


@dataclass(frozen=True)
class Failure:
    """A contestant that did not run to its end, with what it said."""

    message: str


def ours(task: Task, iterations: int, label: str, *overrides: str, once: bool = False) -> Contestant:
    """Our recipe on the common task, with its defaults but for the overrides."""

    def program(folder: Path, seed: int) -> list[str]:
        training: dict[str, Any] = {
            "seed": seed,  # the seed outside is that of the adapters, which the reward model's must equal for a trunk
            "max_steps": iterations * STEPS,
            "per_device_train_batch_size": ppo_task.MICRO_BATCH,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": EPISODES // ppo_task.MICRO_BATCH,
            "num_iterations": ppo_task.PASSES,
            "max_completion_length": ppo_task.NEW_TOKENS,
            "learning_rate": ppo_task.LEARNING_RATE,
            "value_learning_rate": ppo_task.LEARNING_RATE,
            "beta": ppo_task.KL_COEFFICIENT,
            # not part of the task: no other tool stops, evaluates or saves
            "kl_budget": "null",
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": "false",
        }
        return [
            "-m",
            "recipes.ppo",
            *ppo_task.recipe_options(task, folder / "runs"),
            f"data.prompts.path={task.prompts}",
            f"reward.model={task.reward_adapter}",
            "evaluation.prompts=0",
            *(f"training.{key}={value}" for key, value in training.items()),
            *overrides,
        ]

    return Contestant(
        label, Path(sys.executable), ["rlhf_recipes:PPOTrainer"], program, rival=False, steps=STEPS, once=once
    )


def compete(
    contestants: Sequence[Contestant], task: Task, chosen: argparse.Namespace, name: str
) -> dict[str, list[Run | Failure]]:
    """Run everybody in turns and judge what came of it; by label, a result for each turn."""
    contestants = [c for c in contestants if re.search(chosen.only, c.label)]
    runs = [
        (contestant, seed, chosen.cache / "runs" / name / chosen.dtype / contestant.slug / str(seed))
        for seed in range(chosen.turns)
        for contestant in contestants
        if seed == 0 or not contestant.once
    ]
    parts = range(1, chosen.snapshots + 1)
    snapshots = sorted({round(chosen.iterations * part / chosen.snapshots) for part in parts} - {0})
    for contestant, seed, folder in runs:
        if not chosen.judge:
            run(contestant, folder, seed, snapshots=snapshots, resume=chosen.resume)
    again = chosen.judge == "again"
    judge = ppo_task.Judge(task) if snapshots else None
    start = {0: judge.verdict_on(None, again=again)} if judge else {}
    results: dict[str, list[Run | Failure]] = {}
    for contestant, _, folder in runs:
        if (folder / "exit.txt").exists():  # all are, unless nothing was run
            turn = result(folder, judge, start, chosen.iterations, again=again)
            results.setdefault(contestant.label, []).append(turn)
    return results


def result(
    folder: Path, judge: ppo_task.Judge | None, start: dict[int, Verdict], iterations: int, *, again: bool = False
) -> Run | Failure:
    """What a turn came to, from what it left in its folder; no verdicts without a judge."""
    code = int((folder / "exit.txt").read_text())
    if code:
        return Failure(error_line((folder / "log.txt").read_text()) or f"exit code {code}")
    probed = Probed.read(folder)
    if len(probed.seconds) != iterations:
        return Failure(f"{len(probed.seconds)} iterations were counted instead of {iterations}")
    snapshots = {int(file.stem.removeprefix("policy-")): file for file in folder.glob("policy-*.safetensors")}
    verdicts = {n: judge.verdict_on(file, again=again) for n, file in sorted(snapshots.items())} if judge else {}
    return Run(**vars(probed), verdicts=start | verdicts)


def table(results: dict[str, list[Run | Failure]], reference: str, iterations: int, *, busy: bool = False) -> list[str]:
    """One row for each contestant; `reference` is the label whose time the last column takes, and ratios refer to.

    Args:
        busy: other work ran beside, so wall time says nothing.
    """
    columns = ["", "s / episode", "x ours", CPU_SECONDS, "x ours", "peak RSS, MB", "x ours", "peak anonymous, MB"]
    judged = any(isinstance(turn, Run) and turn.rewards for turns in results.values() for turn in turns)
    columns += [f"reward after {iterations * EPISODES} episodes", "reward after our time"] if judged else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    own = results.get(reference, [])
    for label, turns in results.items():
        runs = [turn for turn in turns if isinstance(turn, Run)]
        failures = {turn.message for turn in turns if isinstance(turn, Failure)}
        if runs:
            # a row that ran once is compared with our first turn alone, not with the mean of all of ours
            beside = [(a, b) for a, b in zip(turns, own, strict=False) if isinstance(a, Run) and isinstance(b, Run)]
            equal_time = [turn.reward_after(other.trained(iterations)) for turn, other in beside]
            cells = [
                spread([turn.seconds_per_episode for turn in runs], 3),
                ratio([(turn.seconds_per_episode, other.seconds_per_episode) for turn, other in beside]),
                spread([turn.cpu_seconds_per_episode for turn in runs], 3),
                ratio([(turn.cpu_seconds_per_episode, other.cpu_seconds_per_episode) for turn, other in beside]),
                spread([float(turn.rss) for turn in runs], 0),
                ratio([(turn.rss, other.rss) for turn, other in beside]),
                spread([float(turn.anonymous) for turn in runs], 0),
            ]
            if busy:
                cells[:2] = ["-", "-"]
            if judged:
                cells += [spread([turn.rewards.get(iterations) for turn in runs], 2), spread(equal_time, 2)]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        for message in sorted(failures):
            lines.append(f"| {label} | failed: {message.replace('|', '/')} |" + " |" * (len(columns) - 2))
    return lines


def ratio(beside: Sequence[tuple[float, float]]) -> str:
    """Mean of the first by the mean of the second."""
    return f"{fmean(a for a, _ in beside) / fmean(b for _, b in beside):.2f}" if beside else "-"


def write_report(
    name: str,
    title: str,
    results: dict[str, list[Run | Failure]],
    reference: str,
    chosen: argparse.Namespace,
    notes: str,
) -> None:
    """Print the report, and write it to benchmarks/results/<name>.md unless rows were left out."""
    runs = {label: next((t for t in turns if isinstance(t, Run)), None) for label, turns in results.items()}
    first = next((run for run in runs.values() if run), None)
    repeated = (
        f"Mean over {chosen.turns} turns (lowest to highest), each with a seed of its own; a row without a range for "
        "the time ran in the first turn alone. The tools ran in turns, each in a process of its own."
        if chosen.turns > 1
        else "One run of each, one after the other."
    )
    text = [
        *header(title, name, chosen, first),
        *table(results, reference, chosen.iterations, busy=chosen.busy),
        "",
        repeated,
        "",
        task_line(chosen),
        "- **Time**: without the first iteration, which holds the loading and, in ours, the pretraining of the critic. "
        "CPU seconds are those of all threads, which other work on the machine hardly draws out.",
        "- **Memory**: the peak of the process less what it has after importing its libraries. Resident memory counts "
        "the pages of the mapped weight files, anonymous memory does not.",
        *([_rewards(first.rewards[0], reference)] if first and first.rewards else ()),
        notes.strip(),
        "",
        "Versions:",
        "",
        *(
            f"- {label}: " + ", ".join(f"{p} {v}" for p, v in run.versions.items())
            for label, run in runs.items()
            if run
        ),
        "",
    ]
    publish(name, text, chosen)


def publish(name: str, lines: Sequence[str], chosen: argparse.Namespace) -> None:
    """Print a report, and write it to benchmarks/results/<name>.md unless rows were left out."""
    if chosen.only:
        logger.info("%s", "\n".join(lines))
    else:
        write(name, lines, chosen.dtype)


def task_line(chosen: argparse.Namespace) -> str:
    """What everybody was given to do."""
    return (
        f"- **Task**: {Path(chosen.model).name} in {DTYPES[chosen.dtype]}, LoRA r={ppo_task.RANK} on all linear "
        f"layers, {EPISODES} episodes an iteration of {ppo_task.PROMPT_TOKENS} + {ppo_task.NEW_TOKENS} tokens, "
        f"{ppo_task.PASSES} passes in micro-batches of {ppo_task.MICRO_BATCH} with one optimizer step each, learning "
        f"rate {ppo_task.LEARNING_RATE:g}, KL coefficient {ppo_task.KL_COEFFICIENT:g}, temperature 1, no gradient "
        "checkpointing unless the row says so. The policy starts from the model itself. The reward model was trained "
        "once, by our recipe, and is given to ours as an adapter, to the others in their own form."
    )


def reward_line() -> str:
    """What a reward is."""
    return (
        f"- **Reward**: of {ppo_task.HELD_OUT} held-out prompts with {ppo_task.SAMPLES} samples each, temperature 1, "
        "by the common reward model, whose scores on the base's answers have spread 1."
    )


def _rewards(start: float, reference: str) -> str:
    return (
        f"{reward_line()} The base has {start:.2f}. The iterations that are not timed count here. *Our time* is that "
        f"of the row `{reference}` for all its episodes; between snapshots the reward is read off a line."
    )
