"""Stages and eval on a GPU that is not there: no tensor is forgotten on the CPU, and what is learned is the same."""

import functools
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from commands import OWN, done, small_runs

from rlhf_recipes.roles import HEAD_KEY, read_adapter

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("terminal_left_alone")]


def python(*args):
    """In a process of its own: the device stays registered for as long as a process lives."""
    ended = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def on_gpu(recipe, *overrides, memory=None):
    """What was written, and the peak of the device's memory, of which there are so many bytes."""
    limit = [f"--memory={memory}"] if memory else []
    code, output = python("-m", "benchmarks.pretend_gpu", "--count", *limit, f"recipes.{recipe}", *overrides)
    assert code == 0, output
    written = output.splitlines()
    return output, next(int(line) for line in reversed(written) if line.isdigit())


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Of all chains."""
    return [*small_runs(tmp_path_factory.mktemp("runs")), "training.per_device_eval_batch_size=8"]


@dataclass
class Chain:
    """A run of all stages on the pretended GPU, with the peaks of its memory by stage, and one on the CPU."""

    gpu: Path
    cpu: Path
    peaks: dict[str, int]


@functools.cache
def chain(base, *overrides):
    peaks = {}
    for stage in ("sft", "rm", "dpo", "ppo"):
        own = [f"quantization={base}", *OWN.get(stage, [])]
        _, peaks[stage] = on_gpu(stage, *overrides, f"run={base}-gpu", *own)
        done(stage, *overrides, f"run={base}-cpu", *own)
    folder = Path(overrides[1].removeprefix("runs_dir="))
    return Chain(folder / f"{base}-gpu", folder / f"{base}-cpu", peaks)


@pytest.fixture(scope="module", params=["none", "nf4"])
def either(request, overrides):
    """The chain on each base."""
    return chain(request.param, *overrides)


@pytest.fixture(scope="module")
def unquantized(overrides):
    """The chain on a base in float32."""
    return chain("none", *overrides)


def test_the_pretended_gpu_refuses_what_cuda_refuses_and_nothing_else():
    code, output = python(
        "-c",
        """
import torch
from benchmarks.pretend_gpu import register
libraries = register()
gpu, cpu = torch.ones(2, 3, device="pretend"), torch.ones(2, 3)
for mixed in (lambda: gpu + cpu, lambda: torch.cat([gpu, cpu]), lambda: cpu[gpu > 0], lambda: gpu.numpy(),
              lambda: torch.where(gpu > 0, cpu, gpu), lambda: gpu.index_put_((torch.tensor([0]),), torch.ones(3))):
    try:
        mixed()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("was not refused")
assert (gpu * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 2, "a number may lie anywhere"
assert gpu[torch.tensor([1])].device.type == "pretend", "and so may an index"
assert torch.equal(cpu.copy_(gpu * 3), torch.full((2, 3), 3.0)) and torch.equal(gpu.cpu(), torch.ones(2, 3))
linear = torch.nn.Linear(3, 1).to("pretend")
with torch.autocast("pretend", dtype=torch.bfloat16):
    assert linear(gpu).dtype == torch.bfloat16
linear(gpu).sum().backward()
assert linear.weight.grad.device.type == "pretend" and linear.weight.grad.tolist() == [[2.0] * 3]
""",
    )
    assert code == 0, output


@pytest.mark.parametrize("adapter", ["sft", "rm", "dpo", "ppo", "ppo/value"])
def test_a_stage_learns_the_same_on_a_gpu_as_on_the_cpu(either, adapter):
    """PPO's log-probabilities come from TRL's fused LM head there, and from the completion's logits on a CPU."""
    gpu, cpu = read_adapter(either.gpu / adapter), read_adapter(either.cpu / adapter)
    assert gpu.keys() == cpu.keys() and (HEAD_KEY in gpu) == (adapter in ("rm", "ppo/value"))
    start = read_adapter(either.cpu / "sft")
    moved = [name for name in cpu if adapter == "sft" or name not in start or not torch.equal(cpu[name], start[name])]
    assert moved
    torch.testing.assert_close({n: gpu[n] for n in moved}, {n: cpu[n] for n in moved}, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("stage", "share", "said"),
    [
        ("sft", 0.7, ["micro-batches of 32 are computed in 2 parts"]),
        ("dpo", 0.7, ["micro-batches of 32 are computed in 2 parts"]),
        ("ppo", 0.55, ["sequences at once", "micro-batches of 64 are computed in 2 parts"]),
    ],
)
def test_a_stage_that_does_not_fit_says_so_and_learns_the_same(unquantized, overrides, stage, share, said):
    limit = int(share * unquantized.peaks[stage])
    copied = shutil.copytree(unquantized.gpu, unquantized.gpu.with_name(f"tight-{stage}"))
    output, _ = on_gpu(stage, *overrides, f"run={copied.name}", "overwrite=true", *OWN.get(stage, []), memory=limit)
    assert all(line in output for line in ["out of GPU memory", *said]), output
    learned, whole = read_adapter(copied / stage), read_adapter(unquantized.gpu / stage)
    torch.testing.assert_close(learned, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("unquantized")
def test_ppo_runs_on_a_gpu_in_bf16_with_all_that_it_can_do(overrides):
    output, _ = on_gpu(
        "ppo",
        *(*overrides, "run=none-gpu", "model.dtype=bfloat16", *OWN["ppo"], "guard=gold", "guard.prompts=8"),
        "overwrite=true",
        *("training.ptx_coef=0.1", "training.gradient_checkpointing=true", "training.rollout_batch_size=16"),
        *("training.reward_clip=2", "training.missing_eos_penalty=1", "training.whiten_rewards=true"),
        *("training.kl_target=3", "training.target_kl=0.1", "training.entropy_coef=0.01"),
    )
    assert "none-gpu/ppo is finished" in output


@pytest.mark.usefixtures("unquantized")
def test_eval_runs_on_a_gpu(overrides):
    output, _ = on_gpu("eval", *overrides[:-1], "run=none-gpu")
    assert "best-of-4" in output
