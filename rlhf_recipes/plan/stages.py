"""The peak memory of a stage by part: what it keeps all the time, and what its passes take beside that."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import trl
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import PPOConfig, models
from rlhf_recipes.config import build
from rlhf_recipes.errors import UserError
from rlhf_recipes.plan.dry_run import dry_run, skeleton, without_data
from rlhf_recipes.plan.passes import Passes, adapters
from rlhf_recipes.plan.shapes import model_config

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "trunk", "cache")
CONFIGS = {"sft": trl.SFTConfig, "rm": trl.RewardConfig, "dpo": trl.DPOConfig, "ppo": PPOConfig}
FLOAT32 = 4  # bytes: adapters, their gradients and AdamW's two states

# Bytes that `training.optim` keeps for each trained parameter, by how its name starts; all others: 8, as AdamW. Paged
# states leave the card when it is full; 8-bit ones have a scale in float32 for each 256.
OPTIMIZERS = {
    "paged": 0.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "adamw_bnb_8bit": 2 * (1 + 4 / 256),
    "lion_8bit": 1 + 4 / 256,
    "lion": 4.0,
    "rmsprop": 4.0,
    "adagrad": 4.0,
    "adafactor": 0.1,
    "sgd": 0.0,
}
ADAMW = 8.0


@dataclass(frozen=True)
class Plan:
    """The predicted peak of a phase of a stage, in bytes by part."""

    stage: str
    phase: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def kept(self) -> int:
        """Bytes that no smaller batch or shorter sequence takes away."""
        return sum(self.parts[part] for part in ("weights", "adapters", "gradients", "optimizer"))


def plan(stage: str, cfg: DictConfig, *, prompt_length: int = 512, device: str = "cuda") -> Plan:
    """The peak of a stage on one device, `cuda` or `cpu`, for prompts of some tokens and texts of `max_length`.

    Raises:
        UserError: the model's shape cannot be found, or no length is set.
    """
    return max(phases(stage, cfg, prompt_length=prompt_length, device=device), key=lambda found: found.peak)


def phases(
    stage: str, cfg: DictConfig, *, prompt_length: int = 512, device: str = "cuda", only: Sequence[str] | None = None
) -> Sequence[Plan]:
    """The peak of each phase of a stage, or of some.

    Memory is a straight line in the trained layers and in the frozen ones on top, and those of the trunk leave nothing
    behind, so that models of few layers, one of them with one more here or there, tell it of any number.

    Raises:
        UserError: the model's shape cannot be found, or no length is set.
    """
    dtype = base_dtype(cfg, device)
    args = training_arguments(stage, cfg, dtype)
    text = model_config(cfg.model).get_text_config()
    layers = text.num_hidden_layers
    frozen, frozen_top = (0 if stage == "sft" else int(share * layers) for share in (cfg.trunk, cfg.frozen_top))
    kept = _kept(stage, cfg, args, dtype, range(frozen), range(layers - frozen_top, layers))
    below, above, top = min(frozen, 1), 2, min(frozen_top, 1)

    def measure(
        names: Sequence[str] | None, stage: str = stage, *, above: int = above, top: int = top
    ) -> dict[str, dict[str, int]]:
        return Passes(stage, cfg, args, dtype, device, prompt_length, below, above, top).measure(names)

    few = measure(only)
    if stage == "rm":  # its samples come from a policy, loaded when the trainer is gone
        few |= measure([phase for phase in few if generates(phase)], "sft")
    passes = [phase for phase in few if not generates(phase)]
    one_above = measure(passes, above=above + 1) if passes else {}
    one_on_top = measure(passes, top=top + 1) if passes and frozen_top > top else {}
    beyond = (one_above, layers - frozen - frozen_top - above), (one_on_top, frozen_top - top)
    found = []
    for phase, taken in few.items():
        drawn_out = Counter(taken)
        if generates(phase):
            drawn_out["cache"] += taken.get("cache", 0) * (layers - below - above - top) // (below + above + top)
        for longer, more in beyond:
            if phase in longer:
                drawn_out.update({part: (longer[phase].get(part, 0) - n) * more for part, n in taken.items()})
        parts = dict.fromkeys(PARTS, 0) | kept | {part: max(size, 0) for part, size in drawn_out.items()}
        if stage == "rm" and generates(phase):
            weights, adapter = _sizes(cfg, dtype)
            parts |= {"weights": weights, "adapters": 2 * sum(adapter.values()), "gradients": 0, "optimizer": 0}
        if stage == "ppo" and frozen and not generates(phase):  # PPOTrainer lets go of it before the next rollouts
            tokens = args.generation_batch_size * (prompt_length + args.max_completion_length)
            parts["trunk"] = tokens * text.hidden_size * dtype.itemsize
        found.append(Plan(stage, phase, parts))
    return found


def generates(phase: str) -> bool:
    """Whether each layer leaves its part of a cache in a phase; in the others, something for the backward pass."""
    return phase.startswith(("rollouts", "samples"))


def base_dtype(cfg: DictConfig, device: str) -> torch.dtype:
    """The base's dtype; `auto` on a card is bf16, whatever the machine on which this is planned."""
    return torch.bfloat16 if device == "cuda" and cfg.model.dtype == "auto" else models.dtype(cfg.model)


def training_arguments(stage: str, cfg: DictConfig, dtype: torch.dtype) -> Any:
    """The stage's training arguments as its recipe builds them, except that no GPU is asked for.

    Raises:
        UserError: as in the recipe, or there is no longest sequence to plan for.
    """
    # CUDA graphs are refused without a GPU, which a plan needs not
    own = {"trunk": cfg.trunk, "frozen_top": cfg.frozen_top, "cuda_graphs": False} if stage == "ppo" else {}
    precision = {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16, "use_cpu": True}
    args = build(CONFIGS[stage], cfg.training, output_dir=cfg.runs_dir, **own, **precision)
    if stage != "ppo" and args.max_length is None:
        raise UserError("training.max_length=null: there is no longest sequence to plan for; set a length")
    return args


def _kept(
    stage: str, cfg: DictConfig, args: Any, dtype: torch.dtype, trunk: Iterable[int], top: Iterable[int]
) -> dict[str, int]:
    """Bytes that are there all the time: the base, all adapters, and gradients and states of what is trained."""
    weights, adapter = _sizes(cfg, dtype, classifier=stage == "rm")

    def inside(layers: Iterable[int]) -> int:
        names = tuple(f".layers.{i}." for i in layers)
        return sum(size for name, size in adapter.items() if any(layer in name for layer in names))

    whole, shared = sum(adapter.values()), inside(trunk)
    others = len(adapters(stage, cfg)) - 1
    of_all = whole + others * (whole - shared * (stage == "ppo"))  # PPO's roles share the tensors of the trunk
    trained = whole - shared - inside(top)
    trained *= 2 if stage == "ppo" and not args.freeze_value else 1
    optimizer = next((size for name, size in OPTIMIZERS.items() if str(args.optim.value).startswith(name)), ADAMW)
    return {
        "weights": weights,
        "adapters": of_all,
        "gradients": trained,
        "optimizer": math.ceil(trained / FLOAT32 * optimizer),
    }


def _sizes(cfg: DictConfig, dtype: torch.dtype, *, classifier: bool = False) -> tuple[int, dict[str, int]]:
    """Bytes of the base with the scales of quantized weights, and of each tensor of one adapter in float32."""
    shape = OmegaConf.create({"model": cfg.model, "quantization": cfg.quantization, "lora": cfg.lora})
    return _sizes_of(OmegaConf.to_yaml(shape, resolve=True), dtype, classifier)


@functools.lru_cache
def _sizes_of(shape: str, dtype: torch.dtype, classifier: bool) -> tuple[int, dict[str, int]]:
    """The same of the sections that decide, as YAML: they are equal for many stages and tries."""
    cfg = cast(DictConfig, OmegaConf.create(shape))
    model = skeleton(cfg, model_config(cfg.model), dtype, layers=None, classifier=classifier)
    lora = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with dry_run() as meter:
        without_data(model)
        weights = meter.live.total() - sum(p.nbytes for p in lora.values())
    return weights, {name: p.numel() * FLOAT32 for name, p in lora.items()}
