"""Arguments of PPO: TRL's GRPOConfig with PPO's own added, and what means nothing in PPO refused."""

import json
import math
import os
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env as flag
from safetensors import safe_open
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from trl import GRPOConfig

from rlhf_recipes import machine
from rlhf_recipes.config import ranges
from rlhf_recipes.config.options import NOT_IN_PPO
from rlhf_recipes.ensembles import ENSEMBLES
from rlhf_recipes.roles import ADAPTER_FILE, HEAD_KEY

WITHOUT_EFFECT = ("prefill_chunk_size", "use_cache", "cache_config", "disable_compile", "compile_config")
"""What generation_kwargs may hold, beside `min_new_tokens` (to measure time and memory): nothing that changes what is
sampled."""
EPISODES = 128
"""At least so many make a rollout batch, where nothing else is said."""


@dataclass
class PPOConfig(GRPOConfig):
    r"""
    Arguments of [`PPOTrainer`]. An *iteration* is one rollout batch: its episodes are generated and scored, then
    trained on in `num_iterations` passes. `max_steps` counts optimizer steps, as everywhere in TRL.

    Fields of GRPOConfig that read differently here: `beta` is the KL coefficient *in the reward*, `num_iterations` is
    the number of passes over a rollout batch (PPO's epochs), `epsilon` is the clip range of the policy's ratio,
    `num_generations` the episodes of each prompt (no group: each has its own advantages). What means nothing in PPO is
    refused (`rlhf_recipes.config.options.NOT_IN_PPO`).

    Raises:
        ValueError: a value that cannot work, or an option that does nothing here; all faults in one message.
    """

    # GRPOConfig's, with PPO's defaults
    max_steps: int = field(
        default=800,
        metadata={
            "help": "Optimizer steps in all: a budget of rollouts rather than of epochs. -1: num_train_epochs decides."
        },
    )
    gradient_accumulation_steps: int = field(
        default=4, metadata={"help": "Micro-batches that make an optimizer step. Higher: less memory, slower."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Episodes of a rollout batch, over all devices. None: steps_per_generation micro-batches of each, "
            "and without that as many whole optimizer steps as make 128 episodes or more."
        },
    )
    max_completion_length: int = field(
        default=128, metadata={"help": "Tokens after which a completion is cut. Higher: slower rollouts."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant",
        metadata={"help": "Schedule of the learning rates. Constant: what came before does not depend on max_steps."},
    )
    eval_strategy: IntervalStrategy | str = field(
        default="steps",
        metadata={"help": "When to answer and score the held-out prompts. Without an eval_dataset: never."},
    )
    eval_steps: float | None = field(
        default=None, metadata={"help": "Optimizer steps between two evaluations. None: as save_steps."}
    )
    save_steps: float = field(default=80, metadata={"help": "Optimizer steps between two checkpoints."})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "End with the checkpoint that is best by metric_for_best_model. None: where evaluations and "
            "checkpoints come together."
        },
    )
    metric_for_best_model: str | None = field(
        default="objective",
        metadata={"help": "What the best checkpoint is best by. `objective`: the score less beta times the KL."},
    )
    learning_rate: float = field(
        default=1e-5, metadata={"help": "Initial learning rate of the policy. The critic has its own."}
    )
    beta: float = field(
        default=0.05,
        metadata={
            "help": "Coefficient of the KL penalty to the reference, in the reward. 0 takes no penalty, but the KL is "
            "still logged. Higher: closer to the SFT model, less reward."
        },
    )
    num_generations: int | None = field(
        default=1,
        metadata={
            "help": "Episodes of each prompt in a rollout batch. A critic needs no group. Higher: as many episodes of "
            "fewer prompts."
        },
    )
    num_generations_eval: int | None = field(default=1, metadata={"help": "Episodes per held-out prompt."})
    num_iterations: int = field(
        default=2, metadata={"help": "Passes over each rollout batch. Higher: more from each episode, more off-policy."}
    )

    # KL
    kl_target: float | None = field(
        default=None,
        metadata={"help": "Target KL per sequence, in nats: `beta` becomes adaptive and moves towards it."},
    )
    kl_horizon: int = field(
        default=10_000, metadata={"help": "Episodes over which the adaptive coefficient corrects. Lower: faster."}
    )
    target_kl: float | None = field(
        default=None,
        metadata={
            "help": "Skip the remaining passes over a rollout batch once the policy's KL per token to the policy that "
            "generated it exceeds this."
        },
    )
    kl_budget: float | None = field(
        default=50.0,
        metadata={
            "help": "Stop training once the KL per sequence to the reference exceeds this many nats: far beyond it a "
            "policy says what the reward likes, and nothing else."
        },
    )

    # Rewards
    whiten_rewards: bool = field(
        default=False, metadata={"help": "Scale the rewards per token (KL penalty included) to variance 1."}
    )
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Scale the advantages of a rollout batch to mean 0 and variance 1."}
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Clip each episode's score to plus and minus this, before the KL penalty."}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Subtracted from the score of a completion that was cut at max_completion_length."},
    )
    reward_ensemble: str = field(
        default="mean",
        metadata={
            "help": "How several reward adapters score an episode: `mean`, `worst` (the lowest of their scores) or "
            "`mean_minus_std` (the mean less reward_spread_coef times their spread)."
        },
    )
    reward_spread_coef: float = field(
        default=1.0, metadata={"help": "Weight of the spread in `mean_minus_std`. Higher: more cautious."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount factor."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of GAE for the policy's advantages."})

    # Critic
    value_lam: float = field(
        default=1.0,
        metadata={"help": "Lambda of GAE for the critic's targets. 1: the plain return (VAPO, arXiv 2504.05118)."},
    )
    value_learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of the critic."})
    value_max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping of the critic, on its own."})
    cliprange_value: float | None = field(
        default=0.2,
        metadata={
            "help": "Clip range of the value loss around the old values, in standard deviations of the returns. None: "
            "no clipping."
        },
    )
    value_pretraining_passes: int = field(
        default=4,
        metadata={
            "help": "Passes over the first rollout batch that train the critic alone, before the policy's first step; "
            "the policy's schedule waits. 0: none. Higher: a better first critic, some seconds more."
        },
    )
    value_init: str = field(
        default="reward",
        metadata={
            "help": "Where the critic starts: `reward` (copy of the reward adapter and head; of several, the first), "
            "`sft` (copy of the policy, zero head), or the folder of a saved critic. Without a reward adapter, "
            "`reward` is `sft`."
        },
    )
    value_num_iterations: int | None = field(
        default=1,
        metadata={
            "help": "Passes over each rollout batch that train the critic too: a quarter of an iteration's time each. "
            "None: as many as num_iterations."
        },
    )
    freeze_value: bool = field(
        default=False,
        metadata={"help": "Do not train the critic (a pretrained one, as in DVPO, arXiv 2502.16944)."},
    )

    # SFT loss, shared layers, memory
    ptx_coef: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the SFT loss added to the policy's (PPO-ptx of InstructGPT): what SFT taught is kept."
        },
    )
    trunk: float = field(
        default=0.5,
        metadata={
            "help": "Share of the decoder layers, from the bottom, that stay frozen and are computed once for all "
            "roles. Higher: faster and smaller; 0 trains all layers."
        },
    )
    frozen_top: float = field(
        default=0.0,
        metadata={"help": "Share of the decoder layers, from the top, that stay frozen too: a window is trained."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "Sample over a static cache with each decoding step as one CUDA graph, in place of thousands of "
            "kernel launches. On a GPU alone; not measured yet."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Sequences generated at once. Lower: a smaller cache, slower. None: all of the rollout batch."
        },
    )

    def __post_init__(self) -> None:
        faults = _faults(self)
        if faults:
            raise ValueError("PPOConfig: " + "; ".join(faults))
        _settle(self)
        # GRPOConfig insists on groups of two or more that fill the batch. PPO has none, so it is shown one single
        # group.
        generations = self.num_generations
        steps = self.steps_per_generation or 1
        self.num_generations = self.generation_batch_size or self.per_device_train_batch_size * steps
        if self.num_generations < 2:
            raise ValueError(
                "PPOConfig: a rollout batch of one episode has no spread to learn from; raise steps_per_generation"
            )
        super().__post_init__()
        self.num_generations = generations
        steps, accumulated = self.steps_per_generation, self.gradient_accumulation_steps
        episodes = self.per_device_train_batch_size * self.world_size * steps
        if episodes % generations:
            raise ValueError(
                f"PPOConfig: num_generations={generations} does not divide the {episodes} episodes of a rollout batch"
            )
        if steps % accumulated:
            raise ValueError(
                f"PPOConfig: a rollout batch is {steps} micro-batches (steps_per_generation), no multiple of "
                f"gradient_accumulation_steps={accumulated}: an optimizer step would mix two rollout batches. Set "
                "steps_per_generation to a multiple of it."
            )

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps that one rollout batch serves."""
        return self.num_iterations * self.steps_per_generation // self.gradient_accumulation_steps

    @property
    def prompts_per_iteration(self) -> int:
        """Prompts of a rollout batch, over all devices."""
        return self.per_device_train_batch_size * self.world_size * self.steps_per_generation // self.num_generations


def _settle(args: PPOConfig) -> None:
    """Give a value to what depends on other options and was not set."""
    if args.bf16 is None:  # as the recipes choose; GRPOConfig would insist on a device that has it
        args.bf16 = not args.fp16 and not args.use_cpu and machine.best_dtype() == torch.bfloat16
    if args.eval_steps is None:
        args.eval_steps = args.save_steps
    if args.load_best_model_at_end is None:
        together = args.save_strategy == args.eval_strategy != "no"
        args.load_best_model_at_end = together or args.save_strategy == "best"
    if not (args.generation_batch_size or args.steps_per_generation):
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        step *= int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate say it
        args.steps_per_generation = math.ceil(EPISODES / step) * args.gradient_accumulation_steps


def _default(option: Field[Any]) -> Any:
    return option.default if option.default_factory is MISSING else option.default_factory()


def _no_critic(folder: Path) -> str | None:
    """Why a folder holds no critic; None if it does."""
    file = folder / ADAPTER_FILE
    if not file.exists():
        return f"there is no {ADAPTER_FILE} in such a folder"
    with safe_open(file, framework="pt") as tensors:
        names = tensors.keys()
    return None if HEAD_KEY in names else "an adapter without a scalar head is no critic"


def _faults(args: PPOConfig) -> list[str]:
    """What is wrong with the values, in words."""
    found = [
        f"{option.name}={getattr(args, option.name)!r} has no meaning in PPO: {NOT_IN_PPO[option.name]}"
        for option in fields(args)
        if option.name in NOT_IN_PPO and getattr(args, option.name) != _default(option)
    ]
    found += [
        f"{option.name}={getattr(args, option.name)!r} {wrong}"
        for option in fields(args)
        if (wrong := ranges.fault(f"training.{option.name}", getattr(args, option.name)))
    ]
    rules = {
        "max_completion_length": (args.max_completion_length is not None, "a number of tokens"),
        "num_generations": (args.num_generations is not None, "at least 1"),
        "frozen_top": (args.frozen_top < 1 - args.trunk, "below 1 together with trunk"),
        "reward_ensemble": (args.reward_ensemble in ENSEMBLES, f"one of {', '.join(ENSEMBLES)}"),
        "router_aux_loss_coef": (not args.router_aux_loss_coef, "0 or null: routers are frozen, as all of the base is"),
    }
    found += [f"{name}={getattr(args, name)!r} must be {rule}" for name, (holds, rule) in rules.items() if not holds]
    if args.num_train_epochs != _default(args.__dataclass_fields__["num_train_epochs"]) and args.max_steps > 0:
        found.append(
            f"num_train_epochs={args.num_train_epochs!r} does nothing while max_steps={args.max_steps} decides; set "
            "max_steps=-1"
        )
    given = json.loads(args.generation_kwargs) if isinstance(args.generation_kwargs, str) else args.generation_kwargs
    for name in sorted({*(given or {})} - {*WITHOUT_EFFECT, "min_new_tokens"}):
        own = "max_completion_length" if name == "max_new_tokens" else name
        found.append(
            f"generation_kwargs: {name} is an option of its own, {own}"
            if own in args.__dataclass_fields__
            else f"generation_kwargs: {name} may sample from another distribution than the policy's, and ratio and KL "
            f"would be wrong; what can be given is {', '.join(WITHOUT_EFFECT)}"
        )
    if args.value_init not in ("reward", "sft") and (wrong := _no_critic(Path(args.value_init))):
        found.append(
            f"value_init={args.value_init}: {wrong}; want `reward`, `sft` or a folder such as runs/<run>/ppo/value"
        )
    if args.kl_target is not None and args.beta == 0:
        found.append("kl_target needs a beta above 0 to start from: an adaptive coefficient only scales it")
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        found.append(
            "gradient_checkpointing_kwargs: use_reentrant=True gives no gradients above frozen layers; leave it out"
        )
    if args.fp16 and args.target_kl is not None and args.freeze_value:
        found.append(
            "with fp16 and freeze_value, target_kl can leave a step without any gradient: use bf16, or kl_budget"
        )
    if engine := next((n for n in ("DEEPSPEED", "FSDP", "MEGATRON_LM") if flag(f"ACCELERATE_USE_{n}")), None):
        found.append(f"accelerate was told to use {engine}, which has no meaning in PPO: {NOT_IN_PPO['fsdp']}")
    if args.cuda_graphs and args.use_transformers_continuous_batching:
        found.append("cuda_graphs and use_transformers_continuous_batching exclude each other")
    if args.cuda_graphs and not torch.cuda.is_available():
        found.append("cuda_graphs=True needs a CUDA GPU; rollouts=generate runs everywhere")
    if args.use_transformers_continuous_batching and args.repetition_penalty != 1:
        found.append("repetition_penalty is left out by continuous batching, in silence; rollouts=generate knows it")
    return found
