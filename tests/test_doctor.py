"""`make doctor`: each thing that the recipes stand on is looked at, and what is broken is told with what to do."""

import shutil

import bitsandbytes
import pytest
import torch
from commands import run

from rlhf_recipes import doctor, machine
from rlhf_recipes.errors import UserError

pytestmark = pytest.mark.usefixtures("terminal_left_alone")


@pytest.fixture
def examined(monkeypatch):
    """A function that runs the doctor, but for PPO's self-test unless it is what is tried: the code and the lines."""

    def examine(ppo=False):
        if not ppo:
            monkeypatch.setattr(doctor, "_ppo", lambda: ("self-test", False))
        code, output = run("doctor")
        return code, {line[7:].split("  ")[0].strip(): line for line in output.splitlines() if line[7:8].strip()}

    return examine


def test_a_machine_on_which_all_works_is_described_line_by_line(examined):
    code, lines = examined(ppo=True)
    assert code == 0
    assert f"torch {torch.__version__}" in lines["versions"] and "none; on CPU" in lines["card"]
    assert "cores" in lines["CPU"] and "GB free" in lines["disk"]
    assert "nf4 weights is off by" in lines["4 bits"]
    assert "sampler" in lines["PPO"] and "trunk" in lines["PPO"] and "base 0" in lines["PPO"]
    assert not any("BROKEN" in line for line in lines.values())


def test_a_card_that_torch_cannot_use_is_broken_and_says_what_to_mend(examined, monkeypatch):
    monkeypatch.setattr(machine, "driver", lambda: "535.183.01")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    code, lines = examined()
    assert code == 1 and lines["card"].startswith("BROKEN") and "CUDA 13.0 needs 580 or newer" in lines["card"]


def test_a_card_is_told_with_the_settings_that_suit_it(examined, monkeypatch):
    monkeypatch.setattr(machine, "card", lambda: machine.Card("Tesla T4", (7, 5), int(14.7 * 2**30), 14 * 2**30))
    monkeypatch.setattr(machine, "driver", lambda: "580.65.06")
    code, lines = examined()
    assert code == 0 and "Tesla T4 (14.7 GB, 14.0 free), capability 7.5, driver 580.65.06" in lines["card"]
    assert "hardware=12gb" in lines["card"]


@pytest.mark.parametrize("wrong", [lambda x, *_: x @ torch.zeros(256, 128), lambda *_: 1 / 0], ids=["wrong", "raises"])
def test_a_kernel_for_4_bits_that_is_wrong_or_fails_is_broken(examined, monkeypatch, wrong):
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", wrong)
    code, lines = examined()
    assert code == 1 and lines["4 bits"].startswith("BROKEN") and "quantization=none works without" in lines["4 bits"]
    assert "PPO" in lines, "the rest is told all the same"


def test_a_self_test_that_fails_is_broken(examined, monkeypatch):
    def refuse(*_):
        raise UserError("self-test before the first rollout: ratio")

    monkeypatch.setattr("rlhf_recipes.ppo.self_test.self_test", refuse)
    code, lines = examined(ppo=True)
    assert code == 1 and lines["PPO"].startswith("BROKEN") and "ratio" in lines["PPO"]


def test_a_disk_that_is_nearly_full_is_told(examined, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - 2**31, 2**31))
    code, lines = examined()
    assert code == 0 and "2 GB free here; fewer than 10: make room" in lines["disk"]
