"""The benchmarks against rivals: what they read out of runs, and the table they make of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_cards, rollouts
from benchmarks.ppo_turns import Failure, Run, table
from benchmarks.turns import error_line, spread
from rlhf_recipes.config import compose


def made(step: float, *, rewards: dict[int, float] | None = None) -> Run:
    """A run of eight iterations of `step` seconds each, but for a slow first one."""
    seconds = [100 + step * i for i in range(8)]
    return Run(seconds, rss=1000, anonymous=500, versions={}, threads=1, rewards=rewards or {0: 0.0, 8: 4.0})


def test_time_leaves_out_the_first_iterations() -> None:
    run = made(32.0)
    cheap = Run([1, 2, 3, 4, 5, *run.seconds[5:]], 1000, 500, {}, 1, {})

    assert run.seconds_per_episode == 1.0
    assert cheap.seconds_per_episode == pytest.approx((100 + 7 * 32 - 5) / 3 / 32)


def test_reward_after_a_time_is_read_off_the_line_between_snapshots() -> None:
    run = made(32.0, rewards={0: 1.0, 4: 2.0, 8: 4.0})

    assert run.reward_after(0.0) == 1.0
    assert run.reward_after(4 * 32.0) == 2.0
    assert run.reward_after(6 * 32.0) == 3.0
    assert run.reward_after(9 * 32.0) is None, "the run was shorter"


def test_last_error_of_a_log_is_told_by_its_first_line() -> None:
    log = "ValueError: early\nTraceback:\n  x\ntorch.cuda.OutOfMemoryError: no memory\nmore"

    assert error_line(log) == "torch.cuda.OutOfMemoryError: no memory"
    assert error_line("all is well") is None


def test_spread_names_the_range_only_where_there_is_one() -> None:
    assert spread([0.5, 0.5], 2) == "0.50"
    assert spread([0.5, None, 0.7], 2) == "0.60 (0.50 to 0.70)"
    assert spread([None], 2) == "-"


def test_table_compares_with_ours_and_keeps_failures() -> None:
    results: dict[str, list[Run | Failure]] = {
        "ours": [made(32.0), made(32.0)],
        "slow": [made(64.0), made(64.0)],
        "broken": [Failure("RuntimeError: a | b"), Failure("RuntimeError: a | b")],
    }

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(results, "ours", 8)[2:]]

    assert [row[:3] for row in rows[:2]] == [["ours", "1.000", "1.00"], ["slow", "2.000", "2.00"]]
    assert [row[6:8] for row in rows[:2]] == [["4.00", "4.00"], ["4.00", "2.00"]]
    assert rows[2][:2] == ["broken", "failed: RuntimeError: a / b"]
    assert len({len(row) for row in rows}) == 1


def test_probe_notes_iterations_and_memory_of_a_program(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "weight = torch.nn.Parameter(torch.ones(1))\n"
        "optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "for _ in range(4):\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n"
    )
    options = ["--folder", str(tmp_path), "--steps", "2", "--imports", "peft:PeftModel"]
    subprocess.run([sys.executable, "benchmarks/probe.py", *options, "--", str(program)], check=True)

    figures = json.loads((tmp_path / "probe.json").read_text())
    assert len(figures["seconds"]) == 2, "four optimizer steps, two an iteration"
    assert figures["peak"]["rss"] >= figures["before"]["rss"] > 0
    assert "torch" in figures["versions"]


@pytest.mark.slow
def test_rollouts_are_measured_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts on the embedded model; vLLM, where it is not installed, has a row that says so."""
    small = "--bases float32 --backends generate continuous_batching vllm --prompts 3 --prompt 4 --answer 4 --rounds 1"
    monkeypatch.setattr("benchmarks.turns.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.rollouts.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["rollouts", *small.split()])
    rollouts.main()

    lines = (tmp_path / "rollouts.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| float32")]
    assert [row[1] for row in rows] == ["generate", "continuous_batching", "vllm"]
    assert rows[0][3] == "1.00" and all(float(row[2].replace(",", "")) > 0 for row in rows[:2])
    assert rows[2][2:] == ["not installed", "-", "-", "-"]
    assert "embedded" in lines[2] and "torch" in lines[4]


def test_rows_of_another_base_are_compared_with_their_own() -> None:
    made = {"length": 8.0, "spread": 2.0, "memory": 100}
    cells = {("bfloat16", "generate"): 50.0, ("nf4", "generate"): 20.0, ("nf4", "continuous_batching"): 40.0}
    rows = [{"base": base, "rollouts": backend, "speed": v, **made} for (base, backend), v in cells.items()]

    assert [line.split("|")[4].strip() for line in rollouts.table(rows)[2:]] == ["1.00", "1.00", "2.00"]


def test_without_a_gpu_cards_are_not_measured_and_that_is_said_in_a_line() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_cards"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert (done.returncode, len(done.stdout.splitlines())) == (2, 1)
    assert "nothing was run" in done.stdout


@pytest.mark.slow
def test_a_cell_runs_the_recipe_on_random_weights_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = f"--device cpu --models tiny --stages sft --lengths 24+8 --bases nf4 --cache {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["gpu_cards", *small.split()])
    gpu_cards.main()
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert [cell.strip() for cell in row.split("|")[1:6]] == ["tiny", "nf4", "24+8", "sft", "yes"]

    monkeypatch.setattr(gpu_cards, "measure", None)  # nothing is left to do
    gpu_cards.main()
    assert row in capsys.readouterr().out


def test_a_cell_that_ran_out_of_memory_stays_in_the_table_without_figures() -> None:
    cells = [gpu_cards.Cell(stage, "qwen2.5-7b", "nf4", 512, 256, card=8) for stage in gpu_cards.STAGES]
    results = [
        {"planned": 5 * 2**30, "tokens": 1536, "peak": 4 * 2**30, "seconds": 3.0, "halved": False},
        {"planned": 5 * 2**30, "tokens": 1536, "peak": 4 * 2**30, "seconds": 3.0, "halved": True},
        {"planned": 9 * 2**30, "tokens": 1536, "out_of_memory": True},
        {"planned": 5 * 2**30, "tokens": 1536, "failed": "ValueError: a | b"},
    ]

    rows = [gpu_cards.row(cell, result)[3:] for cell, result in zip(cells, results, strict=True)]

    assert rows == [
        ["sft", "yes", "4.00", "5.00", "yes", "512"],
        ["rm", "halved", "4.00", "5.00", "yes", "512"],
        ["dpo", "no", "-", "9.00", "no", "-"],
        ["ppo", "failed: ValueError: a / b", "-", "5.00", "yes", "-"],
    ]


@pytest.mark.parametrize("stage", gpu_cards.STAGES)
@pytest.mark.parametrize("card", [8, 24])
def test_cells_are_the_recipes_with_the_cards_own_preset(stage: str, card: int, tmp_path: Path) -> None:
    cell = gpu_cards.Cell(stage, "llama3.1-8b", "nf4", 512, 256, card)
    cfg = compose(stage, cell.arguments(tmp_path))

    assert cfg.quantization.load_in_4bit and cfg.training.per_device_train_batch_size in (1, 2, 4, 8)
    assert cell.tokens(cell.arguments(tmp_path)) == 768 * {"sft": 32, "rm": 64, "dpo": 64, "ppo": 128}[stage]
