"""The benchmarks against rivals: what they read out of runs, and the table they make of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ppo_turns import Failure, Run, table
from benchmarks.turns import error_line, spread


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
