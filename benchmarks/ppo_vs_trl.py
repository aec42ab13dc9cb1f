"""PPO against TRL 1.12.0's PPOTrainer, the last that TRL had: writes benchmarks/results/ppo_vs_trl.md.

    python -m benchmarks.ppo_vs_trl [--model <folder or hub id>] [--dtype float32]

Time, memory and reward on one task, on the CPU. The rival's environment is made on the first run.
"""

import json
import logging
from pathlib import Path
from typing import Any

from benchmarks import ppo_task
from benchmarks.ppo_task import STEPS, Task
from benchmarks.ppo_turns import TRAINED, compete, ours, write_report
from benchmarks.turns import DTYPES, Contestant, environment, options

NAME = "ppo_vs_trl"
REQUIREMENTS = ("trl==1.12.0", "torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "bitsandbytes==0.50.2")
NOTES = f"""
{TRAINED}
- **TRL** takes one `local_rollout_forward_batch_size` for sampling and scoring, which a row names. It holds a base each
  for policy, value and reward; the reference is the policy without its adapter. Its own example trains all weights of
  the value model; in the other rows LoRA was put into it.
"""


def main() -> None:
    """Run both in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__)
    short = DTYPES[chosen.dtype]
    reference = f"ours, upper half, {short}"
    python = environment(chosen.cache, "trl", REQUIREMENTS)
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    n = chosen.iterations
    contestants = [
        ours(task, n, reference),
        ours(task, n, f"ours, all layers, {short}", "trunk=0"),
        trl(task, n, python, f"TRL, {short}, rollouts of 32", rollout=32),
        trl(task, n, python, f"TRL, {short}, rollouts of 8", rollout=8, once=True),
        ours(task, n, f"ours, upper half, nf4 in {short}", "quantization=nf4"),
        trl(task, n, python, f"TRL, {short}, full value model, rollouts of 32", rollout=32, full_value=True, once=True),
        trl(task, n, python, f"TRL, nf4 in {short}", rollout=32, nf4=True, once=True),
    ]
    write_report(NAME, "PPO against TRL 1.12.0", compete(contestants, task, chosen, NAME), reference, chosen, NOTES)


def trl(
    task: Task,
    iterations: int,
    python: Path,
    label: str,
    *,
    rollout: int,
    nf4: bool = False,
    full_value: bool = False,
    once: bool = False,
) -> Contestant:
    """TRL's PPOTrainer on the common task."""

    def program(folder: Path, seed: int) -> list[str]:
        training: dict[str, Any] = {
            "output_dir": str(folder / "out"),
            "seed": seed,
            "total_episodes": iterations * ppo_task.EPISODES,
            # the rollout batch; a mini-batch, with an optimizer step, is never split further
            "per_device_train_batch_size": ppo_task.EPISODES,
            "gradient_accumulation_steps": 1,
            "num_mini_batches": ppo_task.EPISODES // ppo_task.MICRO_BATCH,
            "num_ppo_epochs": ppo_task.PASSES,
            "local_rollout_forward_batch_size": rollout,
            "response_length": ppo_task.NEW_TOKENS,
            "stop_token": "eos",
            "temperature": 1.0,
            "learning_rate": ppo_task.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "kl_coef": ppo_task.KL_COEFFICIENT,
            "bf16": task.dtype == "bfloat16",
            "use_cpu": True,
            "gradient_checkpointing": False,
            "num_sample_generations": 0,
            "save_strategy": "no",
            "report_to": "none",
        }
        given = {
            "base": str(task.base),
            "dtype": task.dtype,
            "classifier": str(task.classifier),
            "prompts": ppo_task.prompts_for_rival(task, iterations),
            "lora": {"r": ppo_task.RANK, "lora_alpha": ppo_task.ALPHA},
            "training": training,
            "nf4": nf4,
            "full_value": full_value,
        }
        (folder / "task.json").write_text(json.dumps(given))
        return [str(Path(__file__).parent / "trl_ppo.py"), str(folder / "task.json")]

    imports = ["trl.experimental.ppo:PPOTrainer", "transformers:AutoModelForSequenceClassification", "datasets:Dataset"]
    return Contestant(label, python, imports, program, steps=STEPS, once=once)


if __name__ == "__main__":
    main()
