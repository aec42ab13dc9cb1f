"""RLHF on one GPU: TRL's trainers over one quantized base that holds policy, reference, reward and value."""

from typing import Any

__all__ = ["PPOConfig", "PPOTrainer"]


def __getattr__(name: str) -> Any:
    # importing torch takes seconds, and most of this package does not need it
    if name == "PPOTrainer":
        from rlhf_recipes.ppo.trainer import PPOTrainer

        return PPOTrainer
    if name == "PPOConfig":
        from rlhf_recipes.ppo.config import PPOConfig

        return PPOConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
