"""What follows from the machine: its card is taken, suggested, capped or hidden, and what cannot work is refused."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from commands import done, run, small_runs

from rlhf_recipes import PPOConfig, machine, models
from rlhf_recipes.config import compose, recipe

ROOT = Path(__file__).parents[1]
GB = 2**30


@pytest.fixture
def pretend(monkeypatch):
    """A function that lets torch say that there are cards; nothing can be computed on them."""

    def cards(*, count=1, capability=(8, 9), total=12.0, free=11.0, name="NVIDIA GeForce RTX 4070", wsl=False):
        shares = []

        def visible():
            named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
            return len([card for card in named.split(",") if card])

        answers = {
            "is_available": lambda: visible() > 0,
            "device_count": visible,
            "current_device": lambda: 0,
            "get_device_name": lambda *_: name,
            "get_device_capability": lambda *_: capability,
            "get_device_properties": lambda *_: types.SimpleNamespace(major=capability[0], minor=capability[1]),
            "_check_bf16_tensor_supported": lambda _: True,  # emulated, as torch does it on every card
            "mem_get_info": lambda *_: (int(free * GB), int(total * GB)),
            "set_per_process_memory_fraction": lambda share, *_: shares.append(share),
        }
        for function, answer in answers.items():
            monkeypatch.setattr(torch.cuda, function, answer)
        monkeypatch.setattr(machine, "CARDS", ("/",))
        monkeypatch.setattr(machine, "on_wsl", lambda: wsl)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        return shares

    return cards


@pytest.fixture
def no_card(monkeypatch):
    """A function that lets a machine have a driver, and torch a build, that do not make a usable card."""

    def build(driver, cuda, *, hip=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(machine, "driver", lambda: driver)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return build


def command(*overrides, monkeypatch, capsys):
    """What a recipe writes before it does anything, and the devices that it would see."""
    seen = {}

    @recipe("sft")
    def main(cfg):
        precision = models.precision(cfg)
        seen.update(
            precision, dtype=models.dtype(cfg.model), device=machine.device().type, count=torch.cuda.device_count()
        )

    monkeypatch.setattr(sys, "argv", ["sft", *overrides])
    main()
    return capsys.readouterr().out, seen


# ---- which type


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((6, 1), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_a_card_before_ampere_gets_fp16_since_it_only_emulates_bf16(pretend, capability, dtype):
    pretend(capability=capability)
    cfg = compose("sft")
    assert models.dtype(cfg.model) == dtype
    precision = models.precision(cfg)
    assert (precision["fp16"], precision["bf16"]) == (dtype == torch.float16, dtype == torch.bfloat16)


def test_ppos_own_default_on_such_a_card_is_not_bf16_either(pretend, monkeypatch):
    pretend(capability=(7, 5))
    assert machine.best_dtype() == torch.float16
    assert PPOConfig("out", use_cpu=True).bf16 is False


# ---- no usable card


@pytest.mark.parametrize(
    ("driver", "cuda", "hip", "said"),
    [
        ("535.183.01", "13.0", None, "NVIDIA's driver is 535.183.01. CUDA 13.0 needs 580 or newer: update the driver"),
        (None, "13.0", None, "there is no NVIDIA driver. Install NVIDIA's driver (580 or newer)"),
        (
            "580.65.06",
            None,
            None,
            "built for CPUs alone, can use no card here; NVIDIA's driver is 580.65.06. Install a build",
        ),
        (None, None, "6.4", "built for ROCm 6.4, can use no card here. `nvidia-smi` (or `rocminfo`)"),
    ],
)
def test_a_preset_for_a_card_is_refused_where_torch_can_use_none(no_card, driver, cuda, hip, said, tmp_path):
    no_card(driver, cuda, hip=hip)
    code, output = run("sft", "hardware=12gb", f"runs_dir={tmp_path}", "model.name_or_path=/no/such/model")
    assert code == 2 and output.count("\n") == 1
    assert output.startswith("hardware=12gb is for a card.") and "To run on the CPU: hardware=cpu" in output
    assert said in output and f"torch {torch.__version__}" in output
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_cards_that_the_environment_hides_are_told_of(no_card, monkeypatch):
    no_card("580.65.06", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES= hides the cards: unset it" in machine.why_no_card()


def test_without_a_preset_a_card_that_cannot_be_used_is_told_of_in_a_line(no_card, monkeypatch, capsys):
    no_card("535.183.01", "13.0")
    monkeypatch.setattr(machine, "CARDS", ("/",))
    output, seen = command(monkeypatch=monkeypatch, capsys=capsys)
    assert output.startswith("On the CPU: torch") and "needs 580 or newer" in output and seen["device"] == "cpu"


def test_a_machine_without_a_card_is_told_nothing(monkeypatch, capsys):
    monkeypatch.setattr(machine, "CARDS", ())
    assert command(monkeypatch=monkeypatch, capsys=capsys)[0] == ""


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build  (archlinux-builder@)",
    ],
)
def test_the_drivers_version_is_read_from_the_kernel(monkeypatch, tmp_path, line):
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.2.0")
    monkeypatch.setattr(machine, "DRIVER_FILE", str(tmp_path / "version"))
    assert machine.driver() == "535.183.01"


def test_and_otherwise_from_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "DRIVER_FILE", str(tmp_path / "version"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver() is None
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 566.36\necho 566.36\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert machine.driver() == "566.36"


def test_windows_itself_is_refused_in_a_line_that_names_wsl():
    told = "import sys; sys.platform = 'win32'; import recipes.sft"
    ended = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "WSL" in ended.stderr


# ---- which card


def test_of_two_cards_without_a_launcher_the_first_is_used_and_a_line_says_so(pretend, monkeypatch, capsys):
    pretend(count=2)
    output, seen = command(monkeypatch=monkeypatch, capsys=capsys)
    assert "2 cards are visible and no launcher is at work: card 0 is used (CUDA_VISIBLE_DEVICES=1" in output
    assert "accelerate launch --num_processes 2" in output
    assert seen["count"] == 1, "what TRL would refuse two of"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ, "the next job of a sweep chooses for itself"


def test_of_the_cards_that_the_environment_names_the_first_is_used(pretend, monkeypatch, capsys):
    pretend(count=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    output, seen = command(monkeypatch=monkeypatch, capsys=capsys)
    assert "card 1 is used (CUDA_VISIBLE_DEVICES=0 takes another" in output and seen["count"] == 1


def test_a_launcher_shares_out_the_cards_itself(pretend, monkeypatch, capsys):
    pretend(count=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    output, seen = command(monkeypatch=monkeypatch, capsys=capsys)
    assert "launcher" not in output and seen["count"] == 2


def test_hardware_cpu_hides_a_card_from_everything(pretend, monkeypatch, capsys):
    pretend()
    output, seen = command("hardware=cpu", monkeypatch=monkeypatch, capsys=capsys)
    assert output == ""
    assert seen == {"bf16": False, "fp16": False, "use_cpu": True, "dtype": torch.float32, "device": "cpu", "count": 0}
    assert machine.device().type == "cuda", "for this job alone"


@pytest.mark.slow
@pytest.mark.usefixtures("terminal_left_alone")
def test_a_run_with_hardware_cpu_never_touches_the_card(pretend, tmp_path):
    """Training and eval; on a card that the recipe sees, they fail on this machine."""
    pretend()
    overrides = [*small_runs(tmp_path), "hardware=cpu", "run=cpu"]
    done("sft", *overrides)
    done("eval", *overrides)
    assert "_cuda_setDevice" in run("sft", *overrides[:-2], "run=card")[1]


# ---- what it has


@pytest.mark.parametrize(
    ("total", "preset"),
    [(7.99, "8gb"), (11.76, "12gb"), (14.7, "12gb"), (15.99, "16gb"), (22.5, "16gb"), (23.6, "24gb"), (139.0, "24gb")],
)
def test_the_preset_of_a_card_is_the_largest_that_it_really_has_the_memory_for(total, preset):
    assert machine.Card("", (8, 9), int(total * GB), 0).preset == preset


def test_hardware_auto_names_the_preset_for_the_card_that_it_sees(pretend, monkeypatch, capsys):
    pretend()
    assert command(monkeypatch=monkeypatch, capsys=capsys)[0] == (
        "NVIDIA GeForce RTX 4070 (12.0 GB, 11.0 free): hardware=12gb has settings for it; `make plan` says what fits.\n"
    )
    pretend(total=6)
    assert "smaller than every preset" in command(monkeypatch=monkeypatch, capsys=capsys)[0]
    assert command("hardware=8gb", monkeypatch=monkeypatch, capsys=capsys)[0] == ""


def test_every_preset_for_a_card_is_known():
    files = (ROOT / "conf" / "hardware").glob("*gb.yaml")
    assert sorted(f"{size}gb" for size in machine.PRESETS) == sorted(file.stem for file in files)


def test_on_wsl_the_process_is_capped_below_the_free_memory_so_that_back_off_fires(pretend, monkeypatch, capsys):
    shares = pretend(total=12, free=9)
    command(monkeypatch=monkeypatch, capsys=capsys)
    assert shares == []
    shares = pretend(total=12, free=9, wsl=True)
    command(monkeypatch=monkeypatch, capsys=capsys)
    assert shares == [pytest.approx(0.75 * 0.95)]


def test_cudnns_attention_whose_backward_pass_gives_nan_is_off_on_a_card(pretend, monkeypatch, capsys):
    set_to = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", set_to.append)
    pretend(capability=(9, 0))
    command(monkeypatch=monkeypatch, capsys=capsys)
    assert set_to == [False]


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_ppo_refuses_a_launcher_that_shards_models_and_names_what_does_not(monkeypatch, engine):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(ValueError, match=f"accelerate was told to use {engine}.*OpenRLHF .* or verl"):
        PPOConfig("out", use_cpu=True)


@pytest.mark.parametrize(("marks", "hidden"), [([], True), (["-m", "not gpu"], True), (["-m", "gpu"], False)])
def test_the_tests_hide_a_gpu_unless_they_are_those_of_the_gpu(marks, hidden, tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_seen.py").write_text(
        "import os, pytest\n@pytest.mark.gpu\n@pytest.mark.other\ndef test_seen():\n"
        "    print('SEEN', os.environ.get('CUDA_VISIBLE_DEVICES'))\ndef test_unseen():\n"
        "    print('SEEN', os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *marks, str(tmp_path)]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout
    assert ("SEEN None" not in told) is hidden and "SEEN" in told
