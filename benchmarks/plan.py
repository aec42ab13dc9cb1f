"""How good `make plan` is: predicted against measured peak memory of every stage; writes benchmarks/results/plan.md.

    python -m benchmarks.plan [folder of one more model] [--pretended-gpu]

The real recipes run a few steps on the CPU, on small models with random weights that are made here and on the one in
the folder. Measured is the peak of anonymous memory beyond what the process has after the same stage on a model of next
to no size, which leaves imports and the like behind, less what such a stage takes again (tokenizer, datasets, logs).
Weights are copied off the mapped file, and the allocators keep nothing back, so that what is counted is what is in use.
Linux only; about 20 minutes.

With --pretended-gpu the recipes run on benchmarks.pretend_gpu, where the code of a GPU is taken, and what lived there
is counted; no base in 8 bits runs there. The plan takes all tokens of SFT and DPO for scored ones, and here nearly all
are: where prompts are long, TRL's LM head takes less on a GPU. It writes benchmarks/results/plan_pretended_gpu.md. That
is a check of consistency: plan and count follow the same code over the same tensors, and no card was measured.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    # glibc gives freed memory back at once
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    # oneDNN, which multiplies on a CPU, keeps no buffers for shapes that it has seen
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
    "LRU_CACHE_CAPACITY": "1",
}
RESULTS = Path(__file__).parent / "results"
STAGES = ("sft", "rm", "dpo", "ppo")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")
TINY, QWEN, LLAMA = "tiny", "qwen3 8x512", "llama 6x768"
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
SHAPES: dict[str, dict[str, Any]] = {
    TINY: HEADS | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 128},
    QWEN: HEADS | {"hidden_size": 512, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 50000},
    LLAMA: HEADS
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 32000, "head_dim": 96},
}
GIVEN_PROMPT = 16  # tokens
NF4, INT8, CHECKPOINTS = "quantization=nf4", "quantization=int8", "training.gradient_checkpointing=true"


@dataclass
class Row:
    """One run, and its peaks in bytes: texts of `length` tokens, of which the last `answer` are the answer."""

    stage: str
    model: str
    rows: int
    length: int
    overrides: list[str] = field(default_factory=list)
    predicted: int = 0
    measured: int = 0
    phase: str = ""

    @property
    def answer(self) -> int:
        """Tokens of the answer: a quarter in PPO, elsewhere nearly all, as the plan takes it."""
        return self.length // 4 if self.stage == "ppo" else self.length - GIVEN_PROMPT

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1

    def arguments(self, folder: Path, run: str) -> list[str]:
        """The command line of the recipe."""
        given = [
            f"model.name_or_path={self.model if '/' in self.model else folder / self.model}",
            "model.dtype=bfloat16",
            f"run={run}",
            f"runs_dir={folder}/runs",
            "data=files",
            "data.heldout=2",
            "evaluation.prompts=0",
            "evaluation.max_new_tokens=4",
            "evaluation.batch_size=8",
            f"training.per_device_train_batch_size={self.rows}",
            "training.per_device_eval_batch_size=1",
            "training.gradient_accumulation_steps=2",  # the second has the gradients of the first
            "training.max_steps=2",  # and the second step the optimizer's states
            "training.save_strategy=no",
            "training.gradient_checkpointing=false",
        ]
        if self.stage != "sft":
            given.append("start=model")
        if self.stage == "ppo":
            given += [
                "reward=function",
                f"reward.functions=[{folder}/reward.py:length]",
                f"data.prompts.path={data_file(folder, 'prompts', self.length, self.answer)}",
                f"training.max_completion_length={self.answer}",
                f"training.generation_kwargs={{min_new_tokens: {self.answer}}}",
                "training.steps_per_generation=2",
                "training.num_iterations=1",
                "training.value_pretraining_passes=0",
                "training.eval_strategy=no",
                "training.load_best_model_at_end=false",
            ]
        else:
            part = "sft" if self.stage == "sft" else "preferences"
            file = data_file(folder, part, self.length, self.answer)
            given += [f"data.{part}.path={file}", f"training.max_length={self.length}"]
        return [*given, *self.overrides]


def rows(other: str | None) -> Iterator[Row]:
    """What is run: micro-batches and lengths, with and without 4 bits, 8 bits, checkpointing and trunk."""
    for stage in STAGES:
        upper = [] if stage == "sft" else ["trunk=0.75"]
        every = [] if stage == "sft" else ["trunk=0"]
        yield Row(stage, QWEN, 2, 256)
        yield Row(stage, QWEN, 4, 128, [NF4])
        yield Row(stage, QWEN, 6, 96, [CHECKPOINTS])
        yield Row(stage, LLAMA, 4, 160, upper)
        yield Row(stage, LLAMA, 2, 192, [INT8])
        yield Row(stage, LLAMA, 3, 192, [NF4, CHECKPOINTS])
        yield Row(stage, LLAMA, 1, 384, every)
        if other:
            yield Row(stage, other, 2, 160)
            yield Row(stage, other, 2, 160, [NF4])


def make(folder: Path) -> None:
    """Models with random weights, a tokenizer of words, and data of known lengths."""
    for name in SHAPES:
        make_model(folder, name)
    tiny = [Row(stage, TINY, 1, 256) for stage in STAGES]
    for length, answer in {(row.length, row.answer) for row in [*tiny, *rows("another")]}:
        write_data(folder, length, answer)


def make_model(folder: Path, name: str) -> None:
    """One of the models in bf16, in a folder of its name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    kind = "qwen3" if name == QWEN else "llama"
    config = AutoConfig.for_model(kind, tie_word_embeddings=name == QWEN, **SHAPES[name], **ids)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    write_tokenizer(folder / name)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of five words, `<pad>` is 0 and `<eos>` is 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", "the", "a"))}
    wordwise = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    wordwise.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=wordwise, **tokens).save_pretrained(folder)


def write_data(folder: Path, length: int, answer: int, number: int = 40) -> None:
    """Rows of at most `length` tokens, the last of them an answer's, for every stage; and a reward function."""
    (folder / "reward.py").write_text("def length(completions, **kwargs):\n    return [len(c) for c in completions]\n")
    made: dict[str, list[dict[str, str]]] = {"sft": [], "preferences": [], "prompts": []}
    for i in range(number):
        words_of_prompt = ["the"] * (length - answer - i % 2)  # every batch has a longest row, and padding
        for place, digit in enumerate(f"{i + 1:b}"[::-1]):  # no two are the same
            words_of_prompt[place + 1] = "a" if digit == "1" else "the"
        prompt = {"prompt": " ".join(words_of_prompt)}
        whole, cut = (" " + " ".join(["the"] * n) for n in (answer - 1, answer - 5))
        made["sft"].append(prompt | {"completion": whole})
        made["preferences"].append(prompt | {"chosen": whole, "rejected": cut})
        made["prompts"].append(prompt)
    for part, of_part in made.items():
        data_file(folder, part, length, answer).write_text("".join(json.dumps(row) + "\n" for row in of_part))


def data_file(folder: Path, part: str, length: int, answer: int) -> Path:
    """Where `write_data` puts the rows of a part."""
    return folder / f"{part}-{length - answer}-{answer}.jsonl"


def anonymous(process: int | str = "self") -> int:
    """Anonymous memory of a process, in bytes; 0 when it is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def run(row: Row, folder: Path, number: int, before: Any) -> None:
    """A stage on the tiny model and then on its own, in a process whose output goes into a file; sends what was before.

    Weights are put in memory of their own instead of the mapped file.
    """
    from rlhf_recipes import models

    file = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    load = models.load_base

    def load_off_file(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        for parameter in model.parameters():
            if parameter.is_floating_point():  # what was quantized is off the file, and bitsandbytes knows it twice
                parameter.data = parameter.data.clone()
        return model

    models.load_base = load_off_file
    recipe = importlib.import_module(f"recipes.{row.stage}")
    for turn, each in enumerate((replace(row, model=TINY, rows=1), row)):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        if turn == 1:
            before.send(anonymous())
        sys.argv = [f"recipes.{row.stage}", *each.arguments(folder, f"run{number}-{turn}")]
        recipe.main()


def measure(row: Row, folder: Path, number: int) -> int:
    """Peak of anonymous memory, in bytes, beyond what the process has after the same stage on the tiny model."""
    received, sent = Pipe(duplex=False)
    process = get_context("fork").Process(target=run, args=(row, folder, number, sent))
    process.start()
    before = peak = 0
    while process.is_alive():
        if before or received.poll():
            before = before or received.recv()
            peak = max(peak, anonymous(process.pid or 0))
        time.sleep(0.003)
    if process.exitcode:
        raise RuntimeError(f"{row} failed: {(folder / f'{number}.log').read_text()[-3000:]}")
    return peak - before


def count(row: Row, folder: Path, number: int) -> int:
    """Peak of what lived on the pretended GPU, in bytes."""
    command = [sys.executable, "-m", "benchmarks.pretend_gpu", "--count", f"recipes.{row.stage}"]
    done = subprocess.run([*command, *row.arguments(folder, f"run{number}")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{row} failed: {done.stdout[-1000:]} {done.stderr[-3000:]}")
    return int(done.stdout.splitlines()[-1])


def predict(row: Row, folder: Path, device: str) -> None:
    """Fill in what the plan says of a kind of device."""
    from rlhf_recipes.config import compose
    from rlhf_recipes.plan.stages import plan

    cfg = compose(row.stage, row.arguments(folder, "plan"))
    found = plan(row.stage, cfg, prompt_length=row.length - row.answer, device=device)
    row.predicted, row.phase = found.peak, found.phase


def report(done: list[Row], note: str, chosen: argparse.Namespace) -> str:
    """The tables in Markdown, with the paragraph of this program's description that fits."""
    command = "python -m benchmarks.plan" + " --pretended-gpu" * chosen.pretended_gpu
    found = "counted" if chosen.pretended_gpu else "measured"
    lines = [
        f"# Predicted and {found} peak memory",
        "",
        f"`{command}`, {date.today()}, CPU, one thread, {platform.system()} {platform.machine()}.",
        f"Versions: {', '.join(f'{package} {version(package)}' for package in PACKAGES)}.",
        "",
        (__doc__ or "").split("\n\n")[3 if chosen.pretended_gpu else 2].strip(),
        "",
        f"{note} Nothing in the plan is fitted to these figures: all rows judge it.",
        "",
        "| stage | rows | mean error | largest error |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        errors = [abs(row.error) for row in done if row.stage == stage]
        mean, largest = sum(errors) / len(errors), max(errors)
        lines.append(f"| {stage} | {len(errors)} | {mean:.1%} | {largest:.1%} |")
    columns = "stage | model | micro-batch x tokens | overrides | peak comes in | predicted, MB"
    lines += ["", f"| {columns} | {found}, MB | error |", "|---" * 8 + "|"]
    for row in done:
        given = " ".join(f"`{o}`" for o in row.overrides)
        cells = [row.stage, Path(row.model).name, f"{row.rows} x {row.length}", given, row.phase]
        cells += [str(row.predicted >> 20), str(row.measured >> 20), f"{row.error:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def on_cpu(folder: Path, other: str | None) -> tuple[list[Row], str]:
    """Every row measured on the CPU, and what was taken off."""
    for name in ("evaluation", "backoff", "plan.stages", "preferences", "reward_model", "ppo.trainer", "world"):
        importlib.import_module(f"rlhf_recipes.{name}")
    import trl

    for trainer in ("SFTTrainer", "RewardTrainer", "DPOTrainer"):
        getattr(trl, trainer)
    beside = {}
    for number, stage in enumerate(STAGES):
        beside[stage] = measure(Row(stage, TINY, 1, 256), folder, number)
        print(stage, beside[stage] >> 20, "MB taken off", flush=True)

    def in_use(row: Row, number: int) -> int:
        return measure(row, folder, number + len(STAGES)) - beside[row.stage]

    taken_off = ", ".join(f"{size >> 20} MB in {stage}" for stage, size in beside.items())
    return judged(rows(other), in_use, folder, "cpu"), f"Taken off: {taken_off}."


def on_pretended_gpu(folder: Path, other: str | None) -> tuple[list[Row], str]:
    """Every row counted on the pretended GPU, those in 8 bits on a base in bf16, and what is not counted."""
    without_int8 = [replace(row, overrides=[o for o in row.overrides if o != INT8]) for row in rows(other)]
    note = "What kernels take while they run, and the allocator's fragments, are not counted."
    return judged(without_int8, lambda row, number: count(row, folder, number), folder, "cuda"), note


def judged(asked: Iterable[Row], measured: Callable[[Row, int], int], folder: Path, device: str) -> list[Row]:
    """Rows with what was measured of each, which has a number, and what the plan says of it."""
    done = []
    for number, row in enumerate(asked):
        row.measured = measured(row, number)
        predict(row, folder, device)
        done.append(row)
        print(row, f"{row.error:+.1%}", flush=True)
    return done


def main() -> None:
    """Measure everything and write the table."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):  # they are read when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.plan", *sys.argv[1:]], os.environ | SETTINGS)
    parser = argparse.ArgumentParser(
        "python -m benchmarks.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of one more model")
    parser.add_argument("--pretended-gpu", action="store_true", help="count on a GPU that is not there")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        found = (on_pretended_gpu if chosen.pretended_gpu else on_cpu)(Path(scratch), chosen.model)
    name = "plan_pretended_gpu" if chosen.pretended_gpu else "plan"
    (RESULTS / f"{name}.md").write_text(report(*found, chosen))


if __name__ == "__main__":
    main()
