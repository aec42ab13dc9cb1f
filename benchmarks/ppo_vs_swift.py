"""PPO against ms-swift 4.6.0, the one rival on current libraries: writes benchmarks/results/ppo_vs_swift.md.

    python -m benchmarks.ppo_vs_swift [--model <folder or hub id>] [--dtype float32]

Time, memory and reward on one task, on the CPU, with and without nf4. The rival's environment is made on the first run.
"""

import logging
from pathlib import Path
from typing import Any

from benchmarks import ppo_task
from benchmarks.ppo_task import STEPS, Task
from benchmarks.ppo_turns import TRAINED, compete, ours, write_report
from benchmarks.turns import DTYPES, Contestant, environment, options

NAME = "ppo_vs_swift"
REQUIREMENTS = (
    "ms-swift==4.6.0",
    "torch==2.13.0",
    "trl==0.29.1",
    "transformers==5.16.1",
    "peft==0.20.*",
    "bitsandbytes==0.50.2",
)
NF4 = {
    "quant_method": "bnb",
    "quant_bits": 4,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
NOTES = f"""
{TRAINED}
- **ms-swift** runs TRL 0.29's PPOTrainer, which takes one `local_rollout_forward_batch_size` for sampling and scoring,
  which a row names. It holds a base each for policy, value and reward; the reference is the policy without its adapter.
"""


def main() -> None:
    """Run both in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__)
    short = DTYPES[chosen.dtype]
    reference = f"ours, upper half, {short}"
    python = environment(chosen.cache, "swift", REQUIREMENTS)
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    n = chosen.iterations
    contestants = [
        ours(task, n, reference),
        ours(task, n, f"ours, all layers, {short}", "trunk=0"),
        swift(task, n, python, f"ms-swift, {short}, rollouts of 32", rollout=32),
        swift(task, n, python, f"ms-swift, {short}, rollouts of 8", rollout=8, once=True),
        ours(task, n, f"ours, upper half, nf4 in {short}", "quantization=nf4"),
        swift(task, n, python, f"ms-swift, nf4 in {short}, rollouts of 32", rollout=32, nf4=True),
        swift(task, n, python, f"ms-swift, nf4 in {short}, rollouts of 8", rollout=8, nf4=True, once=True),
    ]
    write_report(NAME, "PPO against ms-swift 4.6.0", compete(contestants, task, chosen, NAME), reference, chosen, NOTES)


def swift(
    task: Task,
    iterations: int,
    python: Path,
    label: str,
    *,
    rollout: int,
    nf4: bool = False,
    once: bool = False,
) -> Contestant:
    """`swift rlhf --rlhf_type ppo` on the common task."""

    def program(folder: Path, seed: int) -> list[str]:
        prompts = ppo_task.prompts_for_rival(task, iterations)
        ppo_task.write_lines(folder / "prompts.jsonl", [{"messages": prompt} for prompt in prompts])
        arguments: dict[str, Any] = {
            "rlhf_type": "ppo",
            "model": task.base,
            "model_type": "llama",
            "check_model": False,  # on its hub
            "template": "chatml",
            "reward_model": task.classifier,
            "reward_model_type": "llama",
            "torch_dtype": task.dtype,
            "tuner_type": "lora",
            "target_modules": "all-linear",
            "lora_rank": ppo_task.RANK,
            "lora_alpha": ppo_task.ALPHA,
            "lora_dropout": 0,
            "dataset": folder / "prompts.jsonl",
            "split_dataset_ratio": 0,
            "load_from_cache_file": False,
            "output_dir": folder / "out",
            "seed": seed,
            "num_train_epochs": 1,  # over as many prompts as there are to be episodes
            # the rollout batch; a mini-batch, with an optimizer step, is never split further
            "per_device_train_batch_size": ppo_task.EPISODES,
            "gradient_accumulation_steps": 1,
            "num_mini_batches": ppo_task.EPISODES // ppo_task.MICRO_BATCH,
            "num_ppo_epochs": ppo_task.PASSES,
            "local_rollout_forward_batch_size": rollout,
            "max_completion_length": ppo_task.NEW_TOKENS,
            "temperature": 1.0,
            "learning_rate": ppo_task.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0,
            "kl_coef": ppo_task.KL_COEFFICIENT,
            "bf16": task.dtype == "bfloat16",
            "fp16": False,  # its default for a base in float32
            "use_cpu": True,
            "gradient_checkpointing": False,
            "num_sample_generations": 0,
            "save_strategy": "no",
            "report_to": "none",
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
        } | (NF4 | {"bnb_4bit_compute_dtype": task.dtype} if nf4 else {})
        flags = [str(part) for key, value in arguments.items() for part in (f"--{key}", value)]
        return ["-m", "swift.cli.rlhf", *flags]

    imports = ["swift.pipelines:rlhf_main", "trl.experimental.ppo:PPOTrainer", "transformers:AutoModelForCausalLM"]
    return Contestant(label, python, imports, program, steps=STEPS, once=once)


if __name__ == "__main__":
    main()
