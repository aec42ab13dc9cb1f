"""Which overrides make a stage fit: found by planning again with each, those first that leave the result as it is."""

import math
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
    over = sorted((phase for phase in found if phase.peak > limit), key=lambda phase: -phase.peak)
    cfg = compose(stage, overrides)
    while over:
        phase, *rest = over
        while phase.peak > limit:
            args = training_arguments(stage, cfg, base_dtype(cfg, device))
            move = next(_moves(stage, phase, cfg, args, limit), None)
            if move is None:
                return None
            extra |= {key: str(value) for key, value in move.items()}
            cfg = compose(stage, with_overrides(overrides, extra))
            [phase] = phases(stage, cfg, only=[phase.phase], **lengths)
        again = phases(stage, cfg, only=[other.phase for other in rest], **lengths) if rest else []
        peaks = {other.phase: other for other in again}
        over = [peaks[other.phase] for other in rest if peaks[other.phase].peak > limit]
    return extra


def _moves(stage: str, phase: Plan, cfg: DictConfig, args: Any, limit: int) -> Iterator[dict[str, Any]]:
    """What can be tried next, the mildest first; what is kept all the time only gets less by the last ones."""
    kept_too_much = phase.kept >= limit
    if not kept_too_much:
        # Half the rows take half of what is not kept, or more: so many times they have to be halved for certain.
        times = max(1, int(math.log2((phase.peak - phase.kept) / (limit - phase.kept))))
        yield from _smaller_batches(phase.phase, cfg, args, times)
        if not args.gradient_checkpointing and not generates(phase.phase) and phase.phase != "evaluation":
            yield {"training.gradient_checkpointing": "true"}
    if not cfg.quantization.get("load_in_4bit"):
        yield {"quantization": "nf4"}
    if stage != "sft" and cfg.trunk < 0.75 < 1 - cfg.frozen_top:
        yield {"trunk": 0.75}
    length = "max_completion_length" if stage == "ppo" else "max_length"
    if getattr(args, length) > 64 and not kept_too_much:
        yield {f"training.{length}": getattr(args, length) // 2}


def _smaller_batches(phase: str, cfg: DictConfig, args: Any, times: int) -> Iterator[dict[str, Any]]:
    """Half as much at once in a phase, so many times, with the same result."""

    def halved(rows: int) -> int:
        return max(rows // 2**times, 1)

    if phase.startswith("samples") and cfg.evaluation.batch_size > 1:
        yield {"evaluation.batch_size": halved(cfg.evaluation.batch_size)}
    if phase == "evaluation" and args.per_device_eval_batch_size > 1:
        yield {"training.per_device_eval_batch_size": halved(args.per_device_eval_batch_size)}
    if phase.startswith("rollouts") and (rows := args.rollout_batch_size or args.generation_batch_size) > 1:
        yield {"training.rollout_batch_size": halved(rows)}
    if not generates(phase) and phase != "evaluation" and (rows := args.per_device_train_batch_size) > 1:
        parts = 2 ** min(times, rows.bit_length() - 1)
        move = {
            "training.per_device_train_batch_size": rows // parts,
            "training.gradient_accumulation_steps": args.gradient_accumulation_steps * parts,
        }
        if "steps_per_generation" in cfg.training:  # PPO's: the rollout batch stays what it is
            move["training.steps_per_generation"] = args.steps_per_generation * parts
        yield move
