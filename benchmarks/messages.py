"""What SFT learns of the same demonstrations as `messages` and as `prompt` + `completion`: writes results/messages.md.

    python -m benchmarks.messages [--model <folder or hub id>]

96 demonstrations of the embedded world as chats, 10 steps of the recipe in float32 on each form; then the negative
log-likelihood of the answers' tokens, which is what a user wants learned. Equal rows have to give equal figures.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.ppo_task import write_lines
from benchmarks.turns import made_with, options, write
from rlhf_recipes import world
from rlhf_recipes.data.formats import render

ROWS, SCORED = 96, 24
TRAINING = {
    "max_steps": 10,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "logging_steps": 10,
}
FORMS = ("messages", "prompt + completion")


def main() -> None:
    """Train on both forms, score the base and both adapters, and write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = options("messages", __doc__, task=False, turns=False)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    chats = demonstrations()
    scores = {"(before training)": nll(base(chosen.model), tokenizer, chats[:SCORED])}
    for form in FORMS:
        adapter = trained(chosen.model, chosen.cache / "messages", form, chats)
        scores[form] = nll(PeftModel.from_pretrained(base(chosen.model), adapter), tokenizer, chats[:SCORED])
    write("messages", report(scores, json.loads((adapter / "manifest.json").read_text()), Path(chosen.model).name))


def report(scores: dict[str, float], manifest: dict[str, Any], model: str) -> list[str]:
    """The lines of the table."""
    return [
        "# SFT on `messages` and on `prompt` + `completion`",
        "",
        *made_with("messages", manifest),
        "",
        f"| {model}, rows as | NLL of an answer's token |",
        "|---|---|",
        *(f"| {form} | {score:.3f} |" for form, score in scores.items()),
        "",
        f"- The same {ROWS} demonstrations, {TRAINING['max_steps']} steps of 8 rows, same seed, float32;",
        f"  scored on the first {SCORED} of them, EOS included.",
        "- NLL: negative log-likelihood, in nats.",
        "- At commit 3fba5c8, when SFT learned prompts and users' turns of `messages` too, the same script gave",
        "  2.149 and 1.497.",
    ]


def demonstrations(part: str = "train") -> list[dict[str, list[dict[str, str]]]]:
    """Chats of a question and its answer, as `prompt` and `completion`."""
    rows = world.demonstrations(0)[part][:ROWS]
    roles = {"prompt": "user", "completion": "assistant"}
    return [{key: [{"role": roles[key], "content": row[key].strip()}] for key in roles} for row in rows]


def trained(model: str, folder: Path, form: str, chats: list[dict[str, list[dict[str, str]]]]) -> Path:
    """The folder of an adapter that the recipe made of the chats in a form."""
    name = form.replace(" + ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("train", chats), ("test", demonstrations("test")[:8])):
        if form == "messages":
            rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
        write_lines(folder / f"{name}-{part}.jsonl", rows)
    overrides = {
        "run": name,
        "runs_dir": folder / "runs",
        "overwrite": "true",
        "model.name_or_path": model,
        "model.dtype": "float32",
        "data": "files",
        "data.sft.path": folder / f"{name}-train.jsonl",
        "data.sft.test": folder / f"{name}-test.jsonl",
        "evaluation.prompts": 0,
        **{f"training.{key}": value for key, value in TRAINING.items()},
    }
    command = [sys.executable, "-m", "recipes.sft", *(f"{key}={value}" for key, value in overrides.items())]
    subprocess.run(command, check=True)
    return folder / "runs" / name / "sft"


def base(model: str) -> PreTrainedModel:
    """The model without an adapter."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@torch.no_grad()
def nll(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, chats: list[dict[str, list[dict[str, str]]]]
) -> float:
    """Mean negative log-likelihood (nats) of the tokens of the answers, EOS included."""
    model.eval()
    total = tokens = 0.0
    for row in chats:
        prompt, completion = render(row, tokenizer)
        logps = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= logps.gather(1, torch.tensor(completion)[:, None]).sum().item()
        tokens += len(completion)
    return total / tokens


if __name__ == "__main__":
    main()
