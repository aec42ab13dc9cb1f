"""Runs a program unchanged, in this process, and notes what it costs; for any tool, in that tool's own environment.

    python benchmarks/probe.py --folder out --steps 8 --snapshots 10,20 --imports trl:GRPOTrainer -- -m recipes.ppo

Written to the folder: `probe.json`, and the policy's adapter after some iterations. Nothing of the program is
replaced: time is read where any optimizer of torch has stepped, the policy is the PEFT model of a causal LM.
"""

import argparse
import importlib
import json
import os
import re
import runpy
import sys
import threading
import time
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("rlhf-recipes", "trl", "llamafactory", "ms-swift", "transformers", "peft", "accelerate"),
    *("datasets", "bitsandbytes", "torch"),
)


def memory(field: str) -> int:
    """A line of /proc/self/status in MB: VmRSS, VmHWM (peak of VmRSS), RssAnon."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


class AnonymousPeak:
    """Peak of the anonymous memory, sampled in the background: the kernel keeps none. Mapped files do not count."""

    def __init__(self, every: float = 0.02) -> None:
        self.peak = 0
        self.every = every
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, memory("RssAnon"))
            time.sleep(self.every)


class Iterations:
    """When each PPO iteration ended, and what the policy was then.

    Args:
        steps: optimizer steps of an iteration.
        snapshots: the iterations after which the policy is written; what that takes is not counted.
    """

    def __init__(self, folder: Path, steps: int, snapshots: set[int]) -> None:
        self.folder, self.steps, self.snapshots = folder, steps, snapshots
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads: what a busy machine does not draw out
        self.models: weakref.WeakSet[Any] = weakref.WeakSet()
        self._stepped = 0
        self._paused = self._cpu_paused = 0.0
        self._policy: set[int] | None = None

    def watch(self) -> None:
        """Be told of every optimizer step and of every PEFT model from now on."""
        from peft import PeftModel
        from torch.optim.optimizer import register_optimizer_step_post_hook

        init = PeftModel.__init__

        def noted(model: Any, *args: Any, **kwargs: Any) -> None:
            init(model, *args, **kwargs)
            self.models.add(model)

        PeftModel.__init__ = noted
        register_optimizer_step_post_hook(lambda optimizer, *_: self._step(optimizer))

    def _step(self, optimizer: Any) -> None:
        if not self._trains_policy(optimizer):
            return
        self._stepped += 1
        if self._stepped % self.steps:
            return
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(now - self._paused)
        self.cpu_seconds.append(cpu - self._cpu_paused)
        if len(self.seconds) in self.snapshots:
            self._snapshot(len(self.seconds))
        self._paused += time.perf_counter() - now
        self._cpu_paused += time.process_time() - cpu

    def _trains_policy(self, optimizer: Any) -> bool:
        """Ours pretrains the critic with an optimizer of its own; without PEFT every optimizer counts."""
        if self._policy is None:
            named = (item for model in self.models for item in model.named_parameters())
            self._policy = {id(parameter) for name, parameter in named if ".default." in name}
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return not self._policy or bool(self._policy & trained)

    def _snapshot(self, iteration: int) -> None:
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        # swift has a second PEFT model, its value model, and LLaMA-Factory a second adapter, its reward model
        policies = [m for m in self.models if type(m.get_base_model()).__name__.endswith("ForCausalLM")]
        if len(policies) != 1:
            raise RuntimeError(f"{len(policies)} PEFT models of a causal LM; which one is the policy?")
        tensors = get_peft_model_state_dict(policies[0], adapter_name="default")
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"policy-{iteration}.safetensors")


def load(names: list[str]) -> None:
    """Import `module:attribute` each; the attribute too, since many libraries are lazy."""
    for name in names:
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute)


def versions() -> dict[str, str]:
    """The versions of the packages that matter, as far as they are installed here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Import, note the memory, run the program, and write the figures down however it ends."""
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps of an iteration")
    parser.add_argument("--snapshots", default="", help="iterations after which to write the policy: 10,20")
    parser.add_argument("--imports", default="", help="what to import beforehand: module:attribute,module:attribute")
    options = parser.parse_args(sys.argv[1:split])
    program = sys.argv[split + 1 :]

    sys.path[0] = os.getcwd()  # as `python -m` has it; it was this file's folder
    load([name for name in options.imports.split(",") if name])
    import torch

    before = {"rss": memory("VmRSS"), "anonymous": memory("RssAnon")}
    anonymous = AnonymousPeak()
    snapshots = {int(iteration) for iteration in options.snapshots.split(",") if iteration}
    iterations = Iterations(options.folder, options.steps, snapshots)
    iterations.watch()
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            runpy.run_path(program[0], run_name="__main__")
    finally:
        peak = {"rss": memory("VmHWM"), "anonymous": max(anonymous.peak, memory("RssAnon"))}
        figures = {
            "seconds": iterations.seconds,
            "cpu_seconds": iterations.cpu_seconds,
            "before": before,
            "peak": peak,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        (options.folder / "probe.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
