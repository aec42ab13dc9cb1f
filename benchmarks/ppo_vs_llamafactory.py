"""PPO against LLaMA-Factory 0.9.1, the leanest rival: writes benchmarks/results/ppo_vs_llamafactory.md.

    python -m benchmarks.ppo_vs_llamafactory [--model <folder or hub id>] [--dtype float32]

Time, memory and reward on one task, on the CPU. The rival's environment is made on the first run.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from benchmarks import ppo_task
from benchmarks.ppo_task import STEPS, Task
from benchmarks.ppo_turns import TRAINED, compete, ours, write_report
from benchmarks.turns import DTYPES, Contestant, environment, options

NAME = "ppo_vs_llamafactory"
# its own pins ask for a trl that its PPO cannot run with; these are the newest of the others that it accepts
REQUIREMENTS = ("llamafactory==0.9.1", "torch==2.13.0", "numpy<2", "pyarrow<19", "pandas<2.3")
NOTES = f"""
{TRAINED}
- **LLaMA-Factory** has one base too: policy and reward model are adapters on it, the reference is the policy without
  its adapter, and the critic is a head on the policy. Its KL coefficient is fixed at 0.2, so everybody has it (it is
  adaptive there, towards 6 nats, by at most 0.06% an iteration). It samples in micro-batches. It ends an answer also at
  `<|im_start|>`.
"""
FLOAT32 = """\
  It scores and trains under torch's autocast, which on a CPU is bf16 also where it is asked for float32; here autocast
  is switched off (benchmarks/llamafactory_float32.py).
"""


def main() -> None:
    """Run both in turns and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options(NAME, __doc__)
    short = DTYPES[chosen.dtype]
    reference = f"ours, upper half, {short}"
    python = environment(chosen.cache, "llamafactory", REQUIREMENTS)
    task = ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype)
    n = chosen.iterations
    translate(task, n)
    contestants = [
        ours(task, n, reference),
        llamafactory(task, n, python, f"LLaMA-Factory, {short}", checkpointing=False),
        ours(task, n, f"ours, all layers, {short}", "trunk=0"),
        ours(task, n, f"ours, upper half, {short}, checkpointing", "training.gradient_checkpointing=true"),
        ours(task, n, f"ours, all layers, {short}, checkpointing", "trunk=0", "training.gradient_checkpointing=true"),
        llamafactory(task, n, python, f"LLaMA-Factory, {short}, checkpointing", checkpointing=True),
    ]
    title = "PPO against LLaMA-Factory 0.9.1"
    notes = NOTES + (FLOAT32 if chosen.dtype == "float32" else "")
    write_report(NAME, title, compete(contestants, task, chosen, NAME), reference, chosen, notes)


def llamafactory(task: Task, iterations: int, python: Path, label: str, *, checkpointing: bool) -> Contestant:
    """LLaMA-Factory on the common task, as it was translated."""
    folder = translated(task)

    def program(run: Path, seed: int) -> list[str]:
        arguments: dict[str, Any] = {
            "stage": "ppo",
            "do_train": True,
            "model_name_or_path": str(folder / "base"),
            "reward_model": str(folder / "reward-adapter"),
            "reward_model_type": "lora",
            "finetuning_type": "lora",
            "lora_rank": ppo_task.RANK,
            "lora_alpha": ppo_task.ALPHA,
            "lora_dropout": 0,
            "lora_target": "all",
            "dataset_dir": str(folder),
            "dataset": "prompts",
            "template": "chatml",
            "cutoff_len": ppo_task.PROMPT_TOKENS + ppo_task.NEW_TOKENS,
            "output_dir": str(run / "out"),
            "seed": seed,
            "max_steps": iterations,  # rollout batches, here
            "per_device_train_batch_size": ppo_task.MICRO_BATCH,
            "gradient_accumulation_steps": 1,
            "ppo_buffer_size": ppo_task.EPISODES // ppo_task.MICRO_BATCH,
            "ppo_epochs": ppo_task.PASSES,
            "learning_rate": ppo_task.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_new_tokens": ppo_task.NEW_TOKENS,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "bf16": task.dtype == "bfloat16",  # else its dtype is float32, as there is no GPU
            "use_cpu": True,
            "disable_gradient_checkpointing": not checkpointing,
            "logging_steps": 1,
            "save_steps": 1_000_000,
            "report_to": "none",
        }
        (run / "arguments.json").write_text(json.dumps(arguments, indent=1))
        launcher = [str(Path(__file__).parent / "llamafactory_float32.py")]
        if task.dtype == "bfloat16":
            launcher = ["-m", "llamafactory.launcher"]
        return [*launcher, str(run / "arguments.json")]

    imports = ["llamafactory.train.tuner:run_exp", "trl:PPOTrainer", "transformers:AutoModelForCausalLM"]
    return Contestant(label, python, imports, program, steps=STEPS)


def translated(task: Task) -> Path:
    """Where the task lies as LLaMA-Factory reads it."""
    return task.folder / "llamafactory"


def translate(task: Task, iterations: int) -> None:
    """Write the task as LLaMA-Factory and its transformers 4.46 and peft 0.12 read it."""
    from safetensors.torch import load_file, save_file

    folder = translated(task)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(task.base, folder / "base")
    # transformers 5 names the type, the rope and the tokenizer's class in a way that 4.46 does not know
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"torch_dtype": config.pop("dtype"), "rope_theta": config.pop("rope_parameters")["rope_theta"]}
    _write(folder / "base" / "config.json", config)
    tokenizer = json.loads((folder / "base" / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": ppo_task.CHATML}
    _write(folder / "base" / "tokenizer_config.json", tokenizer)

    # a reward model is an adapter of the causal LM, with its head in a file of its own
    adapter = folder / "reward-adapter"
    adapter.mkdir()
    tensors = load_file(task.reward_adapter / "adapter_model.safetensors")
    head = next(tensors.pop(key) for key in list(tensors) if key.endswith("score.weight"))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    save_file(
        {"v_head.summary.weight": head, "v_head.summary.bias": head.new_zeros(1)}, adapter / "value_head.safetensors"
    )
    config = json.loads((task.reward_adapter / "adapter_config.json").read_text())
    known = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias", "base_model_name_or_path")
    wanted = {key: config[key] for key in known} | {"task_type": "CAUSAL_LM", "inference_mode": True}
    _write(adapter / "adapter_config.json", wanted)

    prompts = ppo_task.prompts_for_rival(task, iterations)
    rows = [{"instruction": prompt[-1]["content"], "input": "", "output": ""} for prompt in prompts]
    _write(folder / "prompts.json", rows)
    _write(folder / "dataset_info.json", {"prompts": {"file_name": "prompts.json"}})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
