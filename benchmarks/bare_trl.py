"""SFT, RM and DPO as a short TRL script has them, with nothing of ours: what `benchmarks.overhead` measures against."""

import argparse
import json

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

STAGES = {
    "sft": (AutoModelForCausalLM, SFTConfig, SFTTrainer, "CAUSAL_LM"),
    "rm": (AutoModelForSequenceClassification, RewardConfig, RewardTrainer, "SEQ_CLS"),
    "dpo": (AutoModelForCausalLM, DPOConfig, DPOTrainer, "CAUSAL_LM"),
}


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("rows", help="JSONL file")
    parser.add_argument("training", type=json.loads, help="arguments of the trainer's config, as JSON")
    options = parser.parse_args()
    auto, config, trainer, task = STAGES[options.stage]
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    model = auto.from_pretrained(options.model, dtype=options.dtype, **labels)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(options.model).pad_token_id
    trainer(
        model=model,
        args=config(bf16=options.dtype == "bfloat16", report_to="none", **options.training),
        train_dataset=load_dataset("json", data_files=options.rows, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task),
    ).train()


if __name__ == "__main__":
    main()
