"""The common task for TRL 1.12.0's PPOTrainer, after its own example script; run in that rival's environment.

    <environment>/bin/python benchmarks/trl_ppo.py task.json

The example loads policy, reward and value model, each a base of its own; with LoRA the reference is the policy with its
adapter switched off. It trains the value model in all weights; here LoRA is put into it too, as into everybody's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    """Train on what the file says; `lora` and `training` hold options of LoraConfig and PPOConfig."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "task", type=Path, help="JSON: base, dtype, classifier, prompts, lora, training, nf4, full_value"
    )
    task: dict[str, Any] = json.loads(parser.parse_args().task.read_text())

    def classifier() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(task["classifier"], num_labels=1, **loading)

    loading: dict[str, Any] = {"dtype": task["dtype"]}
    if task["nf4"]:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=task["dtype"],
        )
        loading["device_map"] = {"": "cpu"}
    tokenizer = AutoTokenizer.from_pretrained(task["base"], padding_side="left")
    encoded = tokenizer.apply_chat_template(task["prompts"], add_generation_prompt=True, return_dict=True)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **task["lora"])

    value_model = classifier()
    if not task["full_value"]:
        # PPOTrainer wraps the policy alone, and cannot take the value model as a PeftModel; but LoRA can be put into
        # its layers in place
        inject_adapter_in_model(LoraConfig(target_modules="all-linear", **task["lora"]), value_model.model)
        value_model.score.requires_grad_(True)
    trainer = PPOTrainer(
        args=PPOConfig(**task["training"]),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(task["base"], **loading),
        ref_model=None,
        reward_model=classifier(),
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": encoded["input_ids"]}),
        peft_config=lora,
    )
    trainer.train()


if __name__ == "__main__":
    main()
