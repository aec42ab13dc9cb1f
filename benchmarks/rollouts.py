"""PPO's rollouts by every back end, side by side: writes benchmarks/results/rollouts.md.

    python -m benchmarks.rollouts [--model <hub id, folder or embedded>] [--prompts 128] [--prompt 512] [--answer 256]
    python -m benchmarks.rollouts --random qwen2.5-1.5b ...    # weights at random, of a preset's shape

Each row samples the same prompts of random tokens through PPOTrainer, as a run does, in a process of its own; the first
of the rollout batches is not timed. What continuous batching gains depends on how the answers' lengths differ:
`--ends 64` lets about every 64th token of the vocabulary end an answer, for a model that never does.
"""

import argparse
import json
import logging
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from benchmarks.gpu_cards import PRESETS, QWEN_14B, write_shape
from benchmarks.probe import AnonymousPeak, memory, versions
from benchmarks.turns import REPOSITORY, cpu_dtype, error_line, processor, write
from rlhf_recipes.allocator import grow_segments
from rlhf_recipes.figures import number

logger = logging.getLogger(__name__)

BACKENDS = ("generate", "cuda_graphs", "continuous_batching")
BASES = ("float32", "bfloat16", "nf4")


def main() -> None:
    """Measure every row and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options()
    if chosen.cell:
        print(json.dumps(sampled(chosen, *chosen.cell)))
        return
    gpu = torch.cuda.is_available()
    bases = chosen.bases or ["bfloat16" if gpu else cpu_dtype(), "nf4"]
    with tempfile.TemporaryDirectory() as folder:
        if chosen.random:
            chosen.model = folder
            write_weights(chosen.random, Path(folder))
        rows = [measure(chosen, base, backend) for base in bases for backend in chosen.backends]
    device = torch.cuda.get_device_name(0) if gpu else f"{processor()}, {torch.get_num_threads()} threads"
    write("rollouts", [*heading(chosen, device), *table(rows), "", *notes(chosen, gpu)])


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rollouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="hub id, folder or embedded (default: %(default)s)")
    parser.add_argument("--random", choices=[*PRESETS, QWEN_14B], help="instead of a model, the shape of one")
    parser.add_argument("--prompts", type=int, default=128, help="of a rollout batch (default: %(default)s)")
    parser.add_argument("--places", type=int, help="sequences at once, rollout_batch_size (default: all)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument(
        "--answer", type=int, default=64, help="tokens at which an answer is cut (default: %(default)s)"
    )
    parser.add_argument("--ends", type=int, help="let every so many-th token end an answer (default: EOS alone)")
    parser.add_argument("--rounds", type=int, default=3, help="rollout batches that are timed (default: %(default)s)")
    parser.add_argument(
        "--bases", nargs="+", choices=BASES, help="(default: bfloat16, or float32 on a CPU without it; nf4)"
    )
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_weights(shape: str, folder: Path) -> None:
    """A model of a preset's shape with random weights, and a tokenizer, in a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_shape(shape, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure(chosen: argparse.Namespace, base: str, backend: str) -> dict[str, Any]:
    """A row, in a process of its own; what cannot run says why."""
    row: dict[str, Any] = {"base": base, "rollouts": backend}
    if backend == "cuda_graphs" and not torch.cuda.is_available():
        return row | {"why": "on a GPU alone"}
    logger.info("%s, %s ...", base, backend)
    command = [
        sys.executable,
        "-m",
        "benchmarks.rollouts",
        *sys.argv[1:],
        "--model",
        chosen.model,
        "--cell",
        base,
        backend,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        return row | {"why": f"failed: {error_line(done.stdout + done.stderr) or done.stderr[-200:]}"}
    return row | json.loads(done.stdout.splitlines()[-1])


def sampled(chosen: argparse.Namespace, base: str, backend: str) -> dict[str, Any]:
    """Tokens per second, lengths and memory of rollout batches, in this process."""
    from datasets import Dataset

    from rlhf_recipes import PPOConfig, PPOTrainer, models
    from rlhf_recipes.config import build, compose

    grow_segments()
    cfg = compose("ppo", overrides(chosen, base, backend))
    gpu = torch.cuda.is_available()
    prompts = Dataset.from_dict({"prompt": ["-"] * chosen.prompts})
    tokenizer = models.load_tokenizer(cfg.model, prompts)
    chance = random.Random(0)
    vocabulary = models.read_config(cfg.model).get_text_config().vocab_size
    words = [i for i in range(vocabulary) if i not in tokenizer.all_special_ids]
    ids = [chance.choices(words, k=chosen.prompt - i % (chosen.prompt // 4 + 1)) for i in range(chosen.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        args = build(PPOConfig, cfg.training, output_dir=folder, **models.precision(cfg))
        policy = models.load_policy(cfg, None)
        trainer = PPOTrainer(policy, _no_reward, args, prompts, processing_class=tokenizer)
        if chosen.ends:
            ends = list(range(tokenizer.eos_token_id % chosen.ends, vocabulary, chosen.ends))
            trainer.eos_token_ids = trainer.generation_config.eos_token_id = ends
        trainer._generate_single_turn(ids, None, {}, 1)
        before, anonymous = memory("RssAnon"), AnonymousPeak()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        started, lengths = time.perf_counter(), []
        for _ in range(chosen.rounds):
            lengths += [len(completion) for completion in trainer._generate_single_turn(ids, None, {}, 1)[0]]
        seconds = time.perf_counter() - started
    peak = (torch.cuda.max_memory_allocated() - held) // 2**20 if gpu else anonymous.peak - before
    return {"speed": sum(lengths) / seconds, "length": fmean(lengths), "spread": pstdev(lengths), "memory": peak}


def overrides(chosen: argparse.Namespace, base: str, backend: str) -> list[str]:
    """Of the ppo recipe."""
    given = [
        f"model.name_or_path={chosen.model}",
        f"quantization={'nf4' if base == 'nf4' else 'none'}",
        f"model.dtype={'auto' if base == 'nf4' else base}",
        f"rollouts={backend}",
        "start=model",
        f"training.rollout_batch_size={chosen.places or 'null'}",
        f"training.max_completion_length={chosen.answer}",
        f"training.per_device_train_batch_size={chosen.prompts}",
        "training.gradient_accumulation_steps=1",
        "training.steps_per_generation=1",
        "training.save_strategy=no",
        "training.eval_strategy=no",
        "training.load_best_model_at_end=false",
    ]
    return given


def _no_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def heading(chosen: argparse.Namespace, device: str) -> list[str]:
    """What was run, when, and on what."""
    given = " ".join(arg for arg in sys.argv[1:])
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    return [
        "# Rollouts side by side",
        "",
        f"`python -m benchmarks.rollouts {given}`, {chosen.random or Path(chosen.model).name}, {date.today()}, "
        f"{device}, {platform.system()} {platform.machine()}.",
        "",
        f"Versions: {packages}.",
        "",
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each base and back end; speeds are compared with `generate` on the same base."""
    lines = ["| base | rollouts | tokens/s | x generate | tokens of an answer | memory, MB |", "|---" * 6 + "|"]
    for row in rows:
        start = f"| {row['base']} | {row['rollouts']} |"
        if "why" in row:
            lines.append(f"{start} {row['why'].replace('|', '/')} | - | - | - |")
            continue
        plain = next((r["speed"] for r in rows if (r["base"], r["rollouts"]) == (row["base"], "generate")), None)
        ratio = f"{row['speed'] / plain:.2f}" if plain else "-"
        lengths = f"{row['length']:.0f} ± {row['spread']:.0f}"
        lines.append(f"{start} {number(row['speed'])} | {ratio} | {lengths} | {row['memory']:,} |")
    return lines


def notes(chosen: argparse.Namespace, gpu: bool) -> list[str]:
    """What the figures are."""
    ends = f"every {chosen.ends}th token of the vocabulary" if chosen.ends else "EOS"
    kind = "what torch allocates on the GPU" if gpu else "the process's anonymous memory"
    return [
        f"- {chosen.prompts} prompts of up to {chosen.prompt} random tokens, {chosen.places or 'all'} at once; answers "
        f"end at {ends}, or after {chosen.answer} tokens. A LoRA adapter that does nothing yet, r=16, is active.",
        f"- Tokens are those of the answers, over {chosen.rounds} rollout batches; ± is the spread of their lengths.",
        f"- Memory is the peak of {kind} while sampling, less what is there before.",
    ]


if __name__ == "__main__":
    main()
