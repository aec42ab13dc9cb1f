"""Which overrides make a stage fit: found by planning again with each, those first that leave the result as it is."""

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes.config import compose
from rlhf_recipes.plan.command import with_overrides
from rlhf_recipes.plan.stages import Plan, base_dtype, generates, phases, training_arguments


def overrides_that_fit(
    found: Sequence[Plan], overrides: Sequence[str], limit: int, *, prompt_length: int = 512, device: str = "cuda"
) -> dict[str, str] | None:
    """Overrides that make the phases of a stage, as planned under some, fit into `limit` bytes; None where none do."""
    lengths: dict[str, Any] = {"prompt_length": prompt_length, "device": device}
    stage, extra = found[0].stage, dict[str, str]()
    # no override that is tried makes another phase larger: each phase is made to fit on its own, the largest first
    for phase in sorted((p for p in found if p.peak > limit), key=lambda p: -p.peak):
        cfg = compose(stage, with_overrides(overrides, extra))
        peak = phases(stage, cfg, only=phase.phase, **lengths)[0] if extra else phase
        while peak.peak > limit:
            args = training_arguments(stage, cfg, base_dtype(cfg, device))
            move = next(_moves(stage, phase.phase, cfg, args, kept_too_much=peak.kept > limit), None)
            if move is None:
                return None
            extra |= {key: str(value) for key, value in move.items()}
            cfg = compose(stage, with_overrides(overrides, extra))
            peak = phases(stage, cfg, only=phase.phase, **lengths)[0]
    return extra


def _moves(stage: str, phase: str, cfg: DictConfig, args: Any, *, kept_too_much: bool) -> Iterator[dict[str, Any]]:
    """What can be tried next, the mildest first; what is kept all the time only gets less by the last ones."""
    if not kept_too_much:
        yield from _smaller_batches(phase, cfg, args)
        if not args.gradient_checkpointing and not generates(phase) and phase != "evaluation":
            yield {"training.gradient_checkpointing": "true"}
    if not cfg.quantization.get("load_in_4bit"):
        yield {"quantization": "nf4"}
    if stage != "sft" and cfg.trunk < 0.75 < 1 - cfg.frozen_top:
        yield {"trunk": 0.75}
    length = "max_completion_length" if stage == "ppo" else "max_length"
    if getattr(args, length) > 64 and not kept_too_much:
        yield {f"training.{length}": getattr(args, length) // 2}


def _smaller_batches(phase: str, cfg: DictConfig, args: Any) -> Iterator[dict[str, Any]]:
    """Half as much at once in a phase, with the same result."""
    if phase.startswith("samples") and cfg.evaluation.batch_size > 1:
        yield {"evaluation.batch_size": cfg.evaluation.batch_size // 2}
    if phase == "evaluation" and args.per_device_eval_batch_size > 1:
        yield {"training.per_device_eval_batch_size": args.per_device_eval_batch_size // 2}
    if phase.startswith("rollouts") and (rows := args.rollout_batch_size or args.generation_batch_size) > 1:
        yield {"training.rollout_batch_size": rows // 2}
    if not generates(phase) and phase != "evaluation" and args.per_device_train_batch_size > 1:
        move = {
            "training.per_device_train_batch_size": args.per_device_train_batch_size // 2,
            "training.gradient_accumulation_steps": args.gradient_accumulation_steps * 2,
        }
        if "steps_per_generation" in cfg.training:  # PPO's: the rollout batch stays what it is
            move["training.steps_per_generation"] = args.steps_per_generation * 2
        yield move
