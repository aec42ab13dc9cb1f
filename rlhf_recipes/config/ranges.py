"""The numbers that options allow: one table, for the command line before anything is loaded, and for PPOConfig.

A rule is written as a person reads it: `above 0 and at most 1`, `-1 or at least 1`.
"""

import math
import operator
import re
from typing import Any

# by rule and section; the options at the top of a config are in section ""
_ALLOWED = {
    "above 0": {
        "lora": "lora_alpha",
        "judge": "timeout",
        "training": "learning_rate num_train_epochs save_steps eval_steps logging_steps adam_epsilon ddp_timeout "
        "neftune_noise_alpha "
        # PPO's
        "temperature repetition_penalty epsilon epsilon_high kl_target target_kl kl_budget reward_clip cliprange_value "
        "value_learning_rate value_max_grad_norm",
    },
    "at least 0": {
        "quantization": "llm_int8_threshold",
        "lora": "layers_to_transform",
        "evaluation": "prompts",
        "reward": "spread_coef",
        "guard": "spread_coef tolerance root_kl_step",
        "judge": "retries",
        "training": "weight_decay max_grad_norm warmup_steps eval_delay dataloader_num_workers beta "
        "center_rewards_coefficient router_aux_loss_coef "
        # PPO's
        "top_k entropy_coef entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target missing_eos_penalty "
        "ptx_coef reward_spread_coef value_pretraining_passes num_completions_to_print",
    },
    "at least 1": {
        "lora": "r",
        "evaluation": "samples max_new_tokens batch_size",
        "guard": "prompts samples",
        "eval": "benchmark_limit",
        "judge": "concurrency",
        "training": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_length "
        "save_total_limit pad_to_multiple_of torch_empty_cache_steps dataloader_prefetch_factor "
        "dataset_num_proc eval_accumulation_steps precompute_ref_batch_size ref_model_sync_steps "
        # PPO's
        "max_completion_length steps_per_generation num_generations num_generations_eval num_iterations "
        "value_num_iterations rollout_batch_size kl_horizon",
    },
    "at least 2": {"eval": "best_of", "training": "generation_batch_size"},
    "-1 or at least 1": {"training": "max_steps"},
    "above 1": {"training": "delta"},
    "at most 1": {"reward": "min_accuracy", "guard": "min_accuracy"},
    "at least 0 and at most 1": {"training": "gamma lam value_lam min_p ld_alpha ref_model_mixup_alpha"},
    "above 0 and at most 1": {"training": "top_p top_entropy_quantile"},
    "at least 0 and below 1": {
        "": "trunk frozen_top",
        "lora": "lora_dropout",
        "training": "adam_beta1 adam_beta2 label_smoothing_factor trunk frozen_top",
    },
    "at least 0 and below 0.5": {"training": "label_smoothing"},  # DPO's: the share of wrong preferences
    "at least 0 and below 4294967296": {"": "seed", "training": "seed data_seed"},  # numpy's limit
}
RANGES = {
    f"{section}.{name}".lstrip("."): rule
    for rule, sections in _ALLOWED.items()
    for section, names in sections.items()
    for name in names.split()
}
"""The rule of an option by its full key."""

_COMPARED = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def fault(key: str, value: Any) -> str | None:
    """What is wrong with an option's number, or with one of a list of them; None if nothing is.

    Every float has to be finite, with or without a rule.
    """
    items = value if isinstance(value, list) else [value]
    numbers = [item for item in items if isinstance(item, int | float) and not isinstance(item, bool)]
    if not all(map(math.isfinite, numbers)):
        return "must be finite"
    rule = RANGES.get(key)
    return None if rule is None or all(_holds(rule, number) for number in numbers) else f"must be {rule}"


def _holds(rule: str, number: float) -> bool:
    return any(_fulfils(alternative, number) for alternative in rule.split(" or "))


def _fulfils(alternative: str, number: float) -> bool:
    """Whether a number is the one that stands there, or compares as is said."""
    limits = re.findall(rf"({'|'.join(_COMPARED)}) ([\d.]+)", alternative)
    return all(_COMPARED[word](number, float(n)) for word, n in limits) if limits else number == float(alternative)
