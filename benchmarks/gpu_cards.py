"""What fits on cards of 8 to 24 GB: every stage, on models of real shapes, on one GPU under a cap on its memory.

    python -m benchmarks.gpu_cards                                   # everything: hours
    python -m benchmarks.gpu_cards --models qwen2.5-3b --cards 12    # some of it
    python -m benchmarks.gpu_cards --together                        # peaks alone, as many at once as fit on the card

Weights are random, of the real shape, and really quantized; the recipes run as they are with `hardware=<card>gb`. Each
cell is a process of its own, so that one that runs out of memory cannot spoil the next; PPO has the reward model of the
row above it. Finished ones are kept in <cache>/cells.jsonl and are not run again. The cap holds for torch's allocator,
fragments included; what CUDA takes itself is taken off beforehand, as `make plan` does. Writes
benchmarks/results/gpu_cards.md.
"""

import argparse
import importlib
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plan import data_file, write_data, write_tokenizer
from benchmarks.probe import AnonymousPeak, memory, versions
from benchmarks.turns import REPOSITORY, error_line, processor, write
from rlhf_recipes import PPOConfig
from rlhf_recipes.allocator import grow_segments
from rlhf_recipes.config import build, compose
from rlhf_recipes.plan.command import CONTEXT, Asked

logger = logging.getLogger(__name__)

STAGES = ("sft", "rm", "dpo", "ppo")
STEPS = {"sft": 3, "rm": 3, "dpo": 3, "ppo": 2}  # optimizer steps; of PPO, iterations: the first is not timed
QWEN_14B = "qwen2.5-14b"  # for which there is no preset
PRESETS = ("qwen2.5-0.5b", "llama3.2-1b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "llama3.1-8b")
TINY = "tiny"
ROWS = 300  # of data: more than two rollout batches of 128 prompts


@dataclass(frozen=True)
class Cell:
    """A stage on a model under a cap: `card` in GB, 0 for none. What is `timed` has the card to itself, and runs on."""

    stage: str
    model: str
    base: str  # nf4, or the type of the weights
    prompt: int
    answer: int
    card: int
    timed: bool = True

    @property
    def run(self) -> str:
        """Of the same model under the same cap: PPO takes the reward model that is trained before it."""
        return f"{self.model}-{self.base}-{self.prompt}-{self.answer}-{self.card}-{'timed' if self.timed else 'peaks'}"

    def arguments(self, folder: Path) -> list[str]:
        """The command line of the recipe."""
        length = self.prompt + self.answer
        part = {"sft": "sft", "ppo": "prompts"}.get(self.stage, "preferences")
        data = data_file(folder, part, length, self.answer)
        given = [
            *([f"hardware={self.card}gb"] if self.card else ["hardware=cpu"]),
            f"quantization={'nf4' if self.base == 'nf4' else 'none'}",
            f"model.name_or_path={folder / self.model}",
            f"model.dtype={'auto' if self.base == 'nf4' else self.base}",
            *(["start=model"] if self.stage != "sft" else []),
            f"runs_dir={folder / 'runs'}",
            f"run={self.run}",
            "overwrite=true",
            "data=files",
            "data.heldout=2",
            f"data.{part}.path={data}",
            "evaluation.prompts=0",
            "training.save_strategy=no",
        ]
        if not self.card:  # to try this program itself
            given += ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
        if self.stage != "ppo":
            steps = STEPS[self.stage] if self.timed else 2  # the second has the optimizer's states
            return [*given, f"training.max_length={length}", f"training.max_steps={steps}"]
        given += [] if self.card else ["training.steps_per_generation=2"]
        given += [
            f"training.max_completion_length={self.answer}",
            f"training.generation_kwargs={{min_new_tokens: {self.answer}}}",
            "training.value_pretraining_passes=0",
            "training.kl_budget=null",
            "training.eval_strategy=no",
            "training.load_best_model_at_end=false",
        ]
        if not self.timed:
            given.append("training.num_iterations=1")
        iterations = STEPS["ppo"] if self.timed else 1
        return [*given, f"training.max_steps={iterations * self.steps_per_iteration(given)}"]

    def steps_per_iteration(self, overrides: Sequence[str]) -> int:
        """Optimizer steps of what is timed: one, or those that a rollout batch serves."""
        if self.stage != "ppo":
            return 1
        training = ppo_arguments(overrides)
        passes = 2 if self.timed else 1
        return int(passes * training.steps_per_generation // training.gradient_accumulation_steps)

    def tokens(self, overrides: Sequence[str]) -> int:
        """Of the rows of what is timed, each token counted once."""
        training = ppo_arguments(overrides) if self.stage == "ppo" else compose(self.stage, overrides).training
        portions = training.steps_per_generation if self.stage == "ppo" else training.gradient_accumulation_steps
        rows = training.per_device_train_batch_size * portions * (2 if self.stage in ("rm", "dpo") else 1)
        return int(rows * (self.prompt + self.answer))


def ppo_arguments(overrides: Sequence[str]) -> PPOConfig:
    """PPO's arguments with their defaults, whatever device this machine has."""
    return build(PPOConfig, compose("ppo", overrides).training, output_dir=None, use_cpu=True, bf16=False)


def main() -> None:
    """Run the cells that are not there yet, and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options()
    if chosen.cell:
        run(Cell(**json.loads(chosen.cell)), chosen.cache, chosen.device)
        return
    import torch

    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run (--device cpu --models tiny tries the program itself)")
        sys.exit(2)
    folder = chosen.cache
    folder.mkdir(parents=True, exist_ok=True)
    for prompt, answer in chosen.lengths:
        write_data(folder, prompt + answer, answer, ROWS)
    for model in chosen.models:
        write_shape(model, folder / model)
    finished = {cell for cell, result in read(folder).items() if "failed" not in result}
    cells = list(asked(chosen))
    left = [cell for cell in cells if astuple(cell) not in finished]
    for card, of_card in itertools.groupby(left, key=lambda cell: cell.card):
        runs = [list(stages) for _, stages in itertools.groupby(of_card, key=lambda cell: cell.run)]
        with ThreadPoolExecutor(side_by_side(card) if chosen.together else 1) as pool:
            list(pool.map(lambda stages: measure_all(stages, folder, chosen), runs))
    lines = report(cells, read(folder), chosen.device)
    if chosen.device == "cuda":
        write("gpu_cards", lines)
    else:
        print("\n".join(lines))


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_cards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [*PRESETS, QWEN_14B]
    parser.add_argument("--models", nargs="+", default=shapes, choices=[*shapes, TINY])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--cards", nargs="+", type=int, default=[8, 12, 16, 24], choices=[8, 12, 16, 24], help="GB")
    parser.add_argument("--bases", nargs="+", default=["nf4"], choices=["nf4", "bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=lengths, default=[(512, 256), (1024, 512)], help="prompt+answer")
    parser.add_argument("--together", action="store_true", help="several cells at once: peaks hold, none is timed")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: without a cap, for a trial")
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".bench" / "gpu_cards", help="what is kept")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.cache = chosen.cache.resolve()
    return chosen


def lengths(text: str) -> tuple[int, int]:
    """`512+256`, tokens of prompt and answer."""
    prompt, answer = map(int, text.split("+"))
    return prompt, answer


def asked(chosen: argparse.Namespace) -> Iterator[Cell]:
    """The cells of a command line."""
    cards = chosen.cards if chosen.device == "cuda" else [0]
    order = itertools.product(cards, chosen.models, chosen.bases, chosen.lengths, chosen.stages)
    for card, model, base, (prompt, answer), stage in order:
        yield Cell(stage, model, base, prompt, answer, card, timed=not chosen.together)


def write_shape(model: str, folder: Path) -> None:
    """A folder with the config of a model and a tokenizer, but no weights."""
    from transformers import AutoConfig

    from rlhf_recipes.plan.shapes import LLAMA, QWEN, _shape, model_config

    if model == TINY:
        config = AutoConfig.for_model(**_shape(LLAMA, 64, 128, 4, 4, 2, vocab_size=1000))
    elif model == QWEN_14B:
        config = AutoConfig.for_model(
            **_shape(QWEN, 5120, 13824, 48, 40, 8, vocab_size=152064, tie_word_embeddings=False)
        )
    else:
        config = model_config(compose("sft", [f"model={model}"]).model)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, None
    config.save_pretrained(folder)
    write_tokenizer(folder)


def read(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The finished cells."""
    file = folder / "cells.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {astuple(Cell(**{key: row[key] for key in Cell.__annotations__})): row["result"] for row in kept}


# ---------------------------------------------------------------------------------------------------------- one cell


def side_by_side(card: int) -> int:
    """How many cells under a cap of `card` GB the real card has room for."""
    import torch

    if not card or not torch.cuda.is_available():
        return 1
    return max(int(0.95 * torch.cuda.get_device_properties(0).total_memory / 2**30) // card, 1)


def measure_all(cells: Sequence[Cell], folder: Path, chosen: argparse.Namespace) -> None:
    """Run the stages of a run one after the other, each in a process of its own, and keep what came out."""
    for cell in cells:
        result = measure(cell, folder, chosen.device)
        logger.info("%s: %s", cell, result)
        with (folder / "cells.jsonl").open("a") as file:
            file.write(json.dumps(asdict(cell) | {"result": result}) + "\n")


def measure(cell: Cell, folder: Path, device: str) -> dict[str, Any]:
    """Run a cell in a process of its own; it predicts itself, too."""
    here = folder / "cells" / f"{cell.run}-{cell.stage}"
    here.mkdir(parents=True, exist_ok=True)
    written = here / "cell.json"
    written.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_cards", "--cell", json.dumps(asdict(cell))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(
        [*command, "--cache", str(folder), "--device", device],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    log = done.stdout + done.stderr
    (here / "cell.log").write_text(log)
    result = json.loads(written.read_text()) if written.exists() else {}
    if not done.returncode:
        return result | {"halved": "out of GPU memory" in log}
    if "out of GPU memory" in log or "OutOfMemoryError" in log:
        return result | {"out_of_memory": True}
    reason = error_line(log) or (log.strip().splitlines() or ["no output"])[-1]
    return result | {"failed": reason}


def run(cell: Cell, folder: Path, device: str) -> None:
    """Predict, then run, the recipe on random weights in this process; writes bytes and seconds to cell.json."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from rlhf_recipes import PPOTrainer, evaluation, models  # noqa: F401 (imported before memory is looked at)
    from rlhf_recipes.plan.stages import plan

    grow_segments()
    overrides = cell.arguments(folder)
    found = plan(cell.stage, compose(cell.stage, overrides), prompt_length=cell.prompt, device=device)
    figures: dict[str, Any] = {
        "planned": found.peak,
        "planned_phase": found.phase,
        "tokens": cell.tokens(overrides),
    }
    written = folder / "cells" / f"{cell.run}-{cell.stage}" / "cell.json"
    written.write_text(json.dumps(figures))
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cell.card - CONTEXT) * 2**30 / total))
    recipe = importlib.import_module(f"recipes.{cell.stage}")
    for auto in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        setattr(models, auto, RandomWeights(getattr(models, auto)))
    ended: list[float] = []

    def note(*_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        ended.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    before, anonymous = memory("RssAnon"), AnonymousPeak()
    sys.argv = [f"recipes.{cell.stage}", *overrides]
    recipe.main()
    if cell.timed:
        ended = ended[cell.steps_per_iteration(overrides) - 1 :: cell.steps_per_iteration(overrides)]
        figures["seconds"] = median(after - earlier for earlier, after in itertools.pairwise(ended))
    if device == "cuda":
        figures |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    else:
        figures |= {"peak": (anonymous.peak - before) * 2**20}
    written.write_text(json.dumps(figures))


class RandomWeights:
    """In place of an Auto class: loads, and quantizes, random weights of a config's shape in transformers' own way."""

    def __init__(self, auto: Any) -> None:
        self.auto = auto

    def from_pretrained(self, path: str, *, config: Any, dtype: Any, **kwargs: Any) -> Any:
        """As `auto.from_pretrained`. Equal shapes share one tensor, so that the CPU does not hold a whole model."""
        import torch

        kwargs.pop("revision"), kwargs.pop("trust_remote_code")
        with torch.device("meta"):
            empty = self.auto.from_config(config, dtype=dtype)
        made: dict[Any, Any] = {}
        for shape in {parameter.shape for parameter in empty.parameters()}:
            torch.manual_seed(0)  # every stage of a run has the same base
            made[shape] = torch.ones(shape, dtype=dtype) if len(shape) == 1 else torch.randn(shape, dtype=dtype) * 0.02
        state = {name: made[parameter.shape] for name, parameter in empty.named_parameters()}
        if torch.cuda.is_available():
            kwargs.setdefault("device_map", {"": 0})
        model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype, **kwargs)
        for parameter in model.parameters():
            if not torch.cuda.is_available():  # there they were copied to the card
                parameter.data = parameter.data.clone()
        return model


# ------------------------------------------------------------------------------------------------------------- table


def report(cells: Sequence[Cell], finished: dict[tuple[Any, ...], dict[str, Any]], device: str) -> list[str]:
    """A table for each card; only of what was run."""
    import torch

    name = torch.cuda.get_device_name(0) if device == "cuda" else f"{processor()}, without a cap"
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    lines = [
        "# What fits on which card",
        "",
        f"`python -m benchmarks.gpu_cards`, {date.today()}, {name}.",
        "",
        f"Versions: {packages}.",
        "",
        *(__doc__ or "").strip().split("\n\n")[2].splitlines(),
        "",
        "Peak is what torch had allocated at once; planned is what `make plan` says of the same. `halved`: it went on",
        "in smaller parts after it ran out of memory. Tokens are those of the rows, counted once; in PPO an answer's",
        "token is generated, scored and trained on.",
    ]
    columns = "| model | base | tokens | stage | fits | peak, GB | planned, GB | plan: fits | tokens/s |"
    for card, of_card in itertools.groupby(cells, key=lambda cell: cell.card):
        lines += ["", f"## {card} GB" if card else "## No cap", "", columns, "|---" * 9 + "|"]
        lines += [f"| {' | '.join(row(cell, finished[astuple(cell)]))} |" for cell in of_card]
    return lines


def row(cell: Cell, result: dict[str, Any]) -> list[str]:
    """The line of a cell; what did not fit has no peak and no speed."""
    limit = Asked([], {}, cell.card or None).limit
    fits = "no" if "out_of_memory" in result else "halved" if result.get("halved") else "yes"
    measured = "peak" in result
    return [
        cell.model,
        cell.base,
        f"{cell.prompt}+{cell.answer}",
        cell.stage,
        f"failed: {result['failed']}".replace("|", "/") if "failed" in result else fits,
        f"{result['peak'] / 2**30:.2f}" if measured else "-",
        f"{result['planned'] / 2**30:.2f}",
        "-" if limit is None else "yes" if result["planned"] <= limit else "no",
        f"{result['tokens'] / result['seconds']:,.0f}" if "seconds" in result else "-",
    ]


if __name__ == "__main__":
    main()
