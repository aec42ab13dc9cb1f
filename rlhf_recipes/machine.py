"""The machine that a recipe runs on: card, driver, memory, and what follows from them for settings.

Nothing here imports torch before it is asked for, and nothing at all where the machine has no card.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_recipes.errors import UserError

if TYPE_CHECKING:
    import torch

GB = 2**30
PRESETS = (8, 12, 16, 24)
"""GB of the cards that conf/hardware/ has settings for."""
DRIVERS = {13: 580, 12: 525, 11: 450}
"""Oldest major version of NVIDIA's driver by major version of CUDA. Source: CUDA's release notes, table 3."""
CARDS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's on Linux, any on WSL, AMD's
DRIVER_FILE = "/proc/driver/nvidia/version"
INSTALL = "https://pytorch.org/get-started/locally"
SPARED_ON_WSL = 0.05
"""Share of the free memory that is left to Windows, which moves what it lacks to main memory."""


@dataclass(frozen=True)
class Card:
    """The card that this process uses, its memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int

    def __str__(self) -> str:
        return f"{self.name} ({self.total / GB:.1f} GB, {self.free / GB:.1f} free)"

    @property
    def preset(self) -> str | None:
        """The largest `hardware` preset that it has the memory for; a card of nominally 12 GB has a little less."""
        fitting = [size for size in PRESETS if size <= self.total / GB * 1.05]
        return f"{max(fitting)}gb" if fitting else None


def on_wsl() -> bool:
    """Whether this Linux runs inside Windows."""
    return "microsoft" in platform.release().lower()


def device() -> torch.device:
    """Where models live: this process's card, or the CPU; `hardware=cpu` means the CPU also where there is a card."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def random_state_kept() -> AbstractContextManager[None]:
    """Inside, random numbers may be drawn: the state of the CPU and of this process's card is put back."""
    import torch

    own = device()
    return torch.random.fork_rng([own] if own.type == "cuda" else [])


def best_dtype() -> torch.dtype:
    """What the device computes fast in: bf16 on cards since Ampere, fp16 on older ones, which emulate bf16; or fp32."""
    import torch

    if device().type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def multiplies_bf16() -> bool:
    """Whether torch has a fast bf16 matrix product on this CPU."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else False


def card() -> Card | None:
    """The card as it is now; None where torch can use none."""
    import torch

    if device().type != "cuda":
        return None
    own = int(os.environ.get("LOCAL_RANK", 0))
    free, total = torch.cuda.mem_get_info(own)
    return Card(torch.cuda.get_device_name(own), torch.cuda.get_device_capability(own), total, free)


def driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path(DRIVER_FILE).read_text()):
            return found[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return told[0] if told else None
    return None


def why_no_card() -> str:
    """Why torch can use no card here, and what to do about it."""
    import torch

    there, build = driver(), torch.version.cuda or torch.version.hip
    made_for = f"CUDA {build}" if torch.version.cuda else f"ROCm {build}" if build else "CPUs alone"
    said = f"torch {torch.__version__}, built for {made_for}, can use no card here"
    said += f"; NVIDIA's driver is {there}." if there else "; there is no NVIDIA driver." if torch.version.cuda else "."
    oldest = DRIVERS.get(int(torch.version.cuda.partition(".")[0]), 0) if torch.version.cuda else 0
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return f"{said} CUDA_VISIBLE_DEVICES={hidden} hides the cards: unset it."
    if not build:
        return f"{said} Install a build for your card into .venv: {INSTALL}"
    if there and int(there.partition(".")[0]) < oldest:
        return f"{said} CUDA {build} needs {oldest} or newer: update the driver, or install a build for it: {INSTALL}"
    if torch.version.cuda and not there:
        return f"{said} Install NVIDIA's driver ({oldest} or newer), or for an AMD card a ROCm build: {INSTALL}"
    return f"{said} `nvidia-smi` (or `rocminfo`) says whether the system sees one."


@contextlib.contextmanager
def chosen(preset: str | None, *, use_cpu: bool) -> Iterator[str | None]:
    """Inside, this process uses the CPU, or one card; to be entered before CUDA starts.

    Args:
        preset: the choice of the group `hardware`.
        use_cpu: whether the CPU is asked for, whatever there is.

    Yields:
        A line for a person, where there is something to say.

    Raises:
        UserError: a preset for a card, and no card.
    """
    names = ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU")
    before = {name: os.environ.get(name) for name in names}
    try:
        if use_cpu:
            os.environ |= dict(zip(names, ("", "true"), strict=True))
        yield _take_card(preset or "") if not use_cpu and (_sized(preset) or any(map(os.path.exists, CARDS))) else None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def _sized(preset: str | None) -> bool:
    return preset is not None and preset.endswith("gb")


def _take_card(preset: str) -> str | None:
    """Settle which card is used, and how; a line about it."""
    import torch

    lines = [_take_first(torch.cuda.device_count())]
    found = card()
    if found is None and device().type == "cpu":
        if _sized(preset):
            raise UserError(f"hardware={preset} is for a card. {why_no_card()} To run on the CPU: hardware=cpu")
        lines.append(f"On the CPU: {why_no_card()}")
    elif found is not None:
        # its backward pass gives NaN on Hopper, and it is faster nowhere else (pytorch/pytorch issue 196678)
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Windows lends main memory to a full card, at a tenth of the speed, and no error comes (WSL issue 11050)
        if on_wsl():
            share = found.free * (1 - SPARED_ON_WSL) / found.total
            torch.cuda.set_per_process_memory_fraction(share, int(os.environ.get("LOCAL_RANK", 0)))
        if preset == "auto" and os.environ.get("RANK", "0") == "0":
            fitting = f"hardware={found.preset} has settings for it" if found.preset else "smaller than every preset"
            lines.append(f"{found}: {fitting}; `make plan` says what fits.")
    return "\n".join(line for line in lines if line) or None


def _take_first(count: int) -> str | None:
    """Hide all cards but one from a process that no launcher started: TRL refuses to train on several then."""
    if count < 2 or "LOCAL_RANK" in os.environ:
        return None
    first, *others = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = first
    return (
        f"{count} cards are visible and no launcher is at work: card {first} is used (CUDA_VISIBLE_DEVICES={others[0]} "
        f"takes another; `.venv/bin/accelerate launch --num_processes {count} -m recipes.<stage> ...` all of them)."
    )
