"""Carries values from the command line to a config class: Hydra composes, the schema checks, `build` passes on.

    make ppo ARGS="model=qwen2.5-0.5b training.learning_rate=1e-5"

Hydra composes conf/ and the command line. Every key is then held against the config classes' own source, all faults
are told in one message, and only what somebody set reaches the class. Nothing here imports torch: a typo is told in a
second.
"""

from rlhf_recipes.config.command import CONF, build, compose, plain, plain_errors, recipe
from rlhf_recipes.config.stages import by_stage

__all__ = ["CONF", "build", "by_stage", "compose", "plain", "plain_errors", "recipe"]
