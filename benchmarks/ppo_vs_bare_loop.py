"""Our PPO trainer against a bare loop of the same design: writes benchmarks/results/ppo_vs_bare_loop.md.

    python -m benchmarks.ppo_vs_bare_loop [--model <folder or hub id>] [--dtype float32]

What a real trainer adds to the arithmetic (data, checkpoints, metrics, rewards of any kind) should cost little.
"""

import logging
import sys
from pathlib import Path

from benchmarks import ppo_task
from benchmarks.ppo_task import STEPS, Task
from benchmarks.ppo_turns import compete, ours, write_report
from benchmarks.turns import DTYPES, Contestant, options

NAME = "ppo_vs_bare_loop"
TRUNK = 15  # layers: half of SmolLM2's, as the default trunk=0.5
NOTES = """
- **The bare loop** (benchmarks/bare_loop.py) has the same four adapters, trunk, losses and passes, and nothing else.
  Its episodes all have 24 new tokens; ours may end before.
"""


def main() -> None:
    """Run both in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__)
    reference = f"ours, {DTYPES[chosen.dtype]}"
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    contestants = [ours(task, chosen.iterations, reference), bare_loop(task, chosen.iterations)]
    write_report(NAME, "PPO against a bare loop", compete(contestants, task, chosen, NAME), reference, chosen, NOTES)


def bare_loop(task: Task, iterations: int) -> Contestant:
    """The loop on the common task."""

    def program(folder: Path, seed: int) -> list[str]:
        given = {
            "base": task.base,
            "dtype": task.dtype,
            "reward": task.reward_adapter,
            "prompts": task.prompts,
            "iterations": iterations,
            "episodes": ppo_task.EPISODES,
            "micro-batch": ppo_task.MICRO_BATCH,
            "passes": ppo_task.PASSES,
            "new-tokens": ppo_task.NEW_TOKENS,
            "trunk": TRUNK,
            "rank": ppo_task.RANK,
            "alpha": ppo_task.ALPHA,
            "rate": ppo_task.LEARNING_RATE,
            "beta": ppo_task.KL_COEFFICIENT,
            "seed": seed,
        }
        script = str(Path(__file__).parent / "bare_loop.py")
        return [script, *(str(part) for name, value in given.items() for part in (f"--{name}", value))]

    imports = ["transformers:AutoModelForCausalLM", "peft:get_peft_model", "torch:nn"]
    return Contestant(f"bare loop, {DTYPES[task.dtype]}", Path(sys.executable), imports, program, steps=STEPS)


if __name__ == "__main__":
    main()
