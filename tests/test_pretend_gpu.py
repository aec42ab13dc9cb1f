"""Recipes on a GPU that is not there: no tensor is forgotten on the CPU, and the same is learned as on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import done

from rlhf_recipes import world
from rlhf_recipes.roles import HEAD_KEY, read_adapter

ROOT = Path(__file__).parents[1]
PPO = ["training.value_warmup_max_iterations=0", "training.eval_steps=4", "reward.min_accuracy=0"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("terminal_left_alone")]


def python(*args):
    """In a process of its own: the device stays registered for as long as a process lives."""
    ended = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def on_gpu(recipe, *overrides):
    code, output = python("-m", "tests.pretend_gpu", f"recipes.{recipe}", *overrides)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Of both chains."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in world.rankings(0)["train"][:24]))
    return [
        *("experiment=smoke", f"runs_dir={folder}", f"data.preferences.path={folder / 'pairs.jsonl'}"),
        *("evaluation.prompts=8", "evaluation.samples=1"),
    ]


@pytest.fixture(scope="module")
def chains(overrides):
    """The folders of a run of all stages on the pretended GPU, and of one on the CPU."""
    for stage in ("sft", "rm", "dpo", "ppo"):
        own = PPO if stage == "ppo" else []
        on_gpu(stage, *overrides, "run=gpu", *own)
        done(stage, *overrides, "run=cpu", *own)
    folder = Path(overrides[1].removeprefix("runs_dir="))
    return folder / "gpu", folder / "cpu"


def test_the_pretended_gpu_refuses_what_cuda_refuses_and_nothing_else():
    code, output = python(
        "-c",
        """
import torch
from tests.pretend_gpu import register
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
def test_a_stage_learns_the_same_on_a_gpu_as_on_the_cpu(chains, adapter):
    """PPO's log-probabilities come from TRL's fused LM head there, and from the completion's logits on a CPU."""
    gpu, cpu = (read_adapter(chain / adapter) for chain in chains)
    assert gpu.keys() == cpu.keys() and (HEAD_KEY in gpu) == (adapter in ("rm", "ppo/value"))
    start = read_adapter(chains[1] / "sft")
    moved = [name for name in cpu if adapter == "sft" or name not in start or not torch.equal(cpu[name], start[name])]
    assert moved
    torch.testing.assert_close({n: gpu[n] for n in moved}, {n: cpu[n] for n in moved}, atol=1e-4, rtol=1e-3)


@pytest.mark.usefixtures("chains")
def test_ppo_runs_on_a_gpu_in_bf16_with_all_that_it_can_do(overrides):
    output = on_gpu(
        "ppo",
        *(*overrides, "run=gpu", "model.dtype=bfloat16", *PPO, "guard=gold", "guard.prompts=8", "overwrite=true"),
        *("training.ptx_coef=0.1", "training.gradient_checkpointing=true", "training.rollout_batch_size=16"),
        *("training.reward_clip=2", "training.missing_eos_penalty=1", "training.whiten_rewards=true"),
        *("training.kl_target=3", "training.target_kl=0.1", "training.entropy_coef=0.01"),
    )
    assert "gpu/ppo is finished" in output


@pytest.mark.usefixtures("chains")
def test_eval_runs_on_a_gpu(overrides):
    assert "best-of-4" in on_gpu("eval", *overrides, "run=gpu")
