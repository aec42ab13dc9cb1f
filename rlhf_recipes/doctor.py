"""Looks at what the recipes stand on: versions, card, CPU, disk, a 4-bit matrix product, and PPO's self-test."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rlhf_recipes import machine
from rlhf_recipes.config import build, compose
from rlhf_recipes.errors import UserError, first_sentence
from rlhf_recipes.figures import number
from rlhf_recipes.runs.manifest import versions

NF4_TOLERANCE = 0.02
"""Of a 4-bit product, as a fraction of the one by dequantized weights: rounding in bf16; a wrong kernel is off by 1."""
ROOM = 10
"""GB on the disk: less than a 3B model, its checkpoints and the hub's cache take."""

REMEDIES = {
    "4 bits": "quantization=none works without; install bitsandbytes again (make clean setup), or one for this card",
    "PPO": "model.dtype=float32 shows whether it is rounding; make clean setup installs the tested versions again",
}


@dataclass(frozen=True)
class Finding:
    """A line: what was looked at, what is there, what it means; `broken` where the recipes cannot do without."""

    what: str
    there: str
    means: str = ""
    broken: bool = False

    def __str__(self) -> str:
        return f"{'BROKEN' if self.broken else '      '} {self.what:9} {self.there}" + f"; {self.means}" * bool(
            self.means
        )


def examine() -> Iterator[Finding]:
    """Look at one thing after the other."""
    yield Finding("versions", f"Python {platform.python_version()}, {', '.join(map(' '.join, versions().items()))}")
    yield _card()
    yield _cpu()
    free = shutil.disk_usage(".").free / machine.GB
    yield Finding("disk", f"{free:.0f} GB free here", f"fewer than {ROOM}: make room" if free < ROOM else "")
    yield _checked("4 bits", _four_bits)
    yield _checked("PPO", _ppo)


def _card() -> Finding:
    found, there = machine.card(), machine.driver()
    if found is None:
        installed = there is not None and machine.device().type == "cpu"
        on = machine.device().type.upper()
        return Finding(
            "card", "none", f"on {on}: {machine.why_no_card()}" if installed else f"on {on}", broken=installed
        )
    major, minor = found.capability
    by = f"capability {major}.{minor}, driver {there or 'unknown'}"
    kind = str(machine.best_dtype()).removeprefix("torch.")
    preset = f"hardware={found.preset}" if found.preset else "smaller than every preset; make plan says what fits"
    return Finding("card", f"{found}, {by}", f"model.dtype=auto is {kind}; {preset}")


def _cpu() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machine.GB
    fast = machine.multiplies_bf16()
    means = "model.dtype=bfloat16 saves memory there" if fast else "model.dtype=bfloat16 is slow there, float32 is not"
    return Finding("CPU", f"{os.cpu_count()} cores, {memory:.0f} GB, {'' if fast else 'no '}bf16 instructions", means)


def _checked(what: str, check: Callable[[], tuple[str, bool]]) -> Finding:
    """A check that gives its line, or is broken if it raises: whatever the reason, the others are still to be told."""
    try:
        there, broken = check()
    except Exception as error:
        return Finding(what, f"{type(error).__name__}: {first_sentence(error)}", REMEDIES[what], broken=True)
    return Finding(what, there, REMEDIES[what] if broken else "", broken)


def _four_bits() -> tuple[str, bool]:
    """A product with nf4 weights by the kernel, beside that with the weights that they stand for."""
    import torch
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device, dtype = machine.device(), machine.best_dtype()
    drawn = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 256, generator=drawn).to(device, dtype) for rows in (128, 8))
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected = x.float() @ dequantize_4bit(packed, state).float().T
    # a single row has a kernel of its own, as in sampling
    made = torch.cat([matmul_4bit(rows, packed.t(), state) for rows in (x[:1], x[1:])]).float()
    error = ((made - expected).norm() / expected.norm()).item()
    return f"a product with nf4 weights is off by {number(error)} on {device.type}", not error <= NF4_TOLERANCE


def _ppo() -> tuple[str, bool]:
    """PPO's self-test before its first rollout, on the embedded base."""
    from rlhf_recipes import PPOConfig, PPOTrainer, data, models
    from rlhf_recipes.ppo.self_test import self_test

    cfg = compose("ppo", ["start=model", "training.eval_strategy=no", "training.save_strategy=no"])
    rows = data.load(cfg.data, "prompts", cfg.seed).train
    tokenizer = models.load_tokenizer(cfg.model, rows)
    with tempfile.TemporaryDirectory() as folder:
        args = build(PPOConfig, cfg.training, output_dir=folder, **models.precision(cfg))
        policy = models.load_policy(cfg, None)
        trainer = PPOTrainer(policy, _no_reward, args, rows, processing_class=tokenizer)
        try:
            figures = self_test(trainer, rows[:4]["prompt"])
        except UserError as error:
            return str(error), True
    told = ", ".join(f"{name} {number(x)}" for name, x in figures.items() if x is not None)
    return f"self-test on the embedded base ({told})", False


def _no_reward(completions: list[object], **kwargs: object) -> list[float]:
    return [0.0] * len(completions)
