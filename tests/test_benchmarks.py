"""The benchmarks against rivals: what they read out of runs, and the table they make of it."""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    embedded,
    gpu_cards,
    growth,
    interruptions,
    overhead,
    padding,
    ppo_rewards,
    ppo_task,
    ppo_turns,
    ppo_vs_bare_loop,
    ppo_vs_llamafactory,
    ppo_vs_swift,
    ppo_vs_trl,
    reward_scale,
    rollouts,
    stages,
    trained_window_pretrained,
    turns,
)
from benchmarks.ppo_task import Verdict
from benchmarks.ppo_turns import Failure, Run, table
from benchmarks.trained_window import WINDOWS
from benchmarks.trained_window_pretrained import Window
from benchmarks.turns import Contestant, error_line, spread
from rlhf_recipes.config import compose


def made(step: float, *, rewards: dict[int, float] | None = None) -> Run:
    """A run of eight iterations of `step` seconds each, but for a slow first one."""
    seconds = [100 + step * i for i in range(8)]
    verdicts = {n: Verdict(reward, kl=reward / 2) for n, reward in (rewards or {0: 0.0, 8: 4.0}).items()}
    return Run(seconds, 1000, 500, {}, 1, cpu_seconds=[2 * end for end in seconds], verdicts=verdicts)


def test_time_leaves_out_the_first_iteration() -> None:
    run = made(32.0)
    slower = Run([1, *run.seconds[1:]], 1000, 500, {}, 1)

    assert run.seconds_per_episode == 1.0
    assert slower.seconds_per_episode == pytest.approx((100 + 7 * 32 - 1) / 7 / 32)


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
    assert [row[3:5] for row in rows[:2]] == [["2.000", "1.00"], ["4.000", "2.00"]], "of two threads"
    assert [row[8:10] for row in rows[:2]] == [["4.00", "4.00"], ["4.00", "2.00"]]
    assert rows[2][:2] == ["broken", "failed: RuntimeError: a / b"]
    assert len({len(row) for row in rows}) == 1


def cells_of(lines: Sequence[str]) -> list[list[str]]:
    """The rows of a table without its rule, cell by cell."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if set(line) - set("|-")]


def test_a_row_that_ran_once_is_compared_with_our_first_turn() -> None:
    results: dict[str, list[Run | Failure]] = {"ours": [made(32.0), made(64.0)], "once": [made(32.0)]}

    _, ours, once = cells_of(table(results, "ours", 8))

    assert (ours[1], ours[2]) == ("1.500 (1.000 to 2.000)", "1.00")
    assert once[2] == "1.00", "it took what ours took in that turn, not 0.67 of our mean"
    assert cells_of(table(results, "ours", 8, busy=True))[1][1:4] == ["-", "-", ours[3]]


def path(*points: tuple[float, float], seconds: float = 32.0) -> Run:
    """A run of 20 iterations of some CPU seconds, judged at equal distances: reward and KL, the base first."""
    verdicts = {i * 20 // (len(points) - 1): Verdict(reward, kl, k3=2 * kl) for i, (reward, kl) in enumerate(points)}
    ends = [100 + seconds * i for i in range(20)]
    return Run(ends, 1000, 500, {}, 1, cpu_seconds=ends, verdicts=verdicts)


def test_rewards_are_compared_at_equal_kl_and_at_equal_time() -> None:
    far, near = path((0.0, 0.0), (1.0, 1.0), (1.5, 4.0), seconds=64.0), path((0.0, 0.0), (0.8, 1.0))
    results: dict[str, list[Run | Failure]] = {
        ppo_rewards.DEFAULT: [near, near],
        "broken": [far, Failure("RuntimeError: a | b")],
    }

    head, ours, broken = cells_of(ppo_rewards.table(results))

    assert head[5:7] == ["reward at a KL of 0.50", "reward at a KL of 1.00"], "all runs came to 1"
    assert ours[1:5] == ["0.80", "1.00", "2.00", "0.60 ± 0.00"] and ours[6] == "0.80"
    assert broken[1:4] == ["1.50", "4.00", "8.00"] and broken[6] == "1.00", "less its KL, it is no better"
    assert (ours[8], broken[8]) == ("0.80", "1.00"), "half of the episodes at twice the time"
    assert (ours[9], broken[9]) == ("2 of 2", "1 of 2")


def test_reward_at_a_kl_goes_with_its_root_and_is_none_beyond_the_run() -> None:
    run = path((0.0, 0.0), (1.0, 4.0), (2.0, 2.0), (3.0, 9.0))

    assert ppo_rewards.reward_at(run, 1.0) == pytest.approx(0.5), "half of the way in the root"
    assert ppo_rewards.reward_at(run, 4.0) == pytest.approx(1.0), "where the run first comes to it"
    assert ppo_rewards.reward_at(run, 9.5) is None


def test_curves_of_reward_against_kl_are_drawn_by_tool(tmp_path: Path) -> None:
    runs = {"ours": [path((0.0, 0.0), (1.0, 1.0))], "failed everywhere": []}

    ppo_rewards.draw(runs, tmp_path / "curves.svg")
    _, ours, none = cells_of(ppo_rewards.curves(runs))

    assert "KL to the base, nats per completion" in (tmp_path / "curves.svg").read_text()
    assert ours == ["ours", "0.00 (0.00)", "1.00 (1.00)"] and none[1:] == ["-", "-"]


def test_a_windows_reward_after_equal_time_is_that_of_the_default_window_in_all_of_its_episodes() -> None:
    seconds = dict.fromkeys(WINDOWS, 32.0) | {"all": 64.0, "upper sixth": 16.0}
    found = {name: Window([0.9], [Verdict(1.0, 0.5)], [made(step)]) for name, step in seconds.items()}

    lines = trained_window_pretrained.table(found, 8, depth=30)
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:]))
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}

    assert [cells[name]["layers"] for name in WINDOWS] == ["1 to 30", "16 to 30", "21 to 30", "26 to 30", "11 to 20"]
    assert cells["all"]["x default"] == "2.00"
    assert cells["all"]["PPO: reward after equal time"] == "2.00", "half of its episodes"
    assert cells["upper sixth"]["PPO: reward after equal time"] == "4.00", "it has no more episodes than the default"


def test_runs_without_snapshots_are_not_judged_and_the_table_has_no_rewards(
    chosen: argparse.Namespace, task: ppo_task.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen.snapshots = 0
    cost = {"seconds": [1.0, 33.0], "before": {"rss": 1, "anonymous": 1}, "peak": {"rss": 3, "anonymous": 2}}
    cost |= {"cpu_seconds": [2.0, 18.0]}
    monkeypatch.setattr(ppo_task, "Judge", None)

    def leave(contestant: Contestant, folder: Path, seed: int, *, snapshots: list[int], resume: bool) -> None:
        assert snapshots == []
        folder.mkdir(parents=True)
        (folder / "exit.txt").write_text("0")
        (folder / "probe.json").write_text(json.dumps(cost | {"versions": {}, "threads": 1}))

    monkeypatch.setattr(ppo_turns, "run", leave)
    same = Contestant("ours", Path(sys.executable), [], lambda folder, seed: [])
    head, _, row = table(ppo_turns.compete([same], task, chosen, "costs"), "ours", 2)

    assert "reward" not in head and row == "| ours | 1.000 | 1.00 | 0.500 | 1.00 | 2 | 1.00 | 1 |"


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_dtype_is_bf16_where_the_cpu_multiplies_it(fast: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.machine.multiplies_bf16", lambda: fast)

    monkeypatch.setattr(sys, "argv", ["stages"])
    assert turns.options("stages", None, task=False).dtype == dtype
    monkeypatch.setattr(sys, "argv", ["stages", "--dtype", "bfloat16"])
    assert turns.options("stages", None, task=False).dtype == "bfloat16"


def test_the_judge_counts_the_kl_over_the_whole_vocabulary_and_keeps_its_verdicts(
    tiny_llama: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import LlamaForSequenceClassification

    monkeypatch.setattr(ppo_task, "NEW_TOKENS", 1)  # the KL of one token needs no samples
    made, words = ppo_task.Task(tmp_path, "float32"), ["w1", "w2 w3"]
    tokenizer = copy.deepcopy(tokenizer)  # other tests share it
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m.content.split()[-1] }} {% endfor %}"
    base = tiny_llama()
    for model in (base, LlamaForSequenceClassification(base.config)):
        folder = made.base if model is base else made.classifier
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    ppo_task.write_lines(made.held_out, [{"prompt": [{"role": "user", "content": text}]} for text in words])
    lora = LoraConfig(r=ppo_task.RANK, lora_alpha=ppo_task.ALPHA, target_modules="all-linear", init_lora_weights=False)
    policy = get_peft_model(base, lora)
    save_file(get_peft_model_state_dict(policy), tmp_path / "policy-4.safetensors")

    ids = torch.tensor([[tokenizer.convert_tokens_to_ids(w) for w in ("w9", last)] for last in ("w1", "w3")])
    with torch.no_grad():
        p = policy(input_ids=ids).logits[:, -1].log_softmax(-1)
        with policy.disable_adapter():
            q = policy(input_ids=ids).logits[:, -1].log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1).mean().item()
    judge = ppo_task.Judge(made)

    start, verdict = judge.verdict_on(None), judge.verdict_on(tmp_path / "policy-4.safetensors")

    assert verdict.kl == pytest.approx(exact, rel=1e-4) and verdict.k3 != pytest.approx(exact, rel=1e-2)
    assert (start.kl, start.k3) == (0.0, 0.0)
    monkeypatch.setattr(judge, "verdict", lambda _: Verdict(9.0, 9.0))
    assert judge.verdict_on(tmp_path / "policy-4.safetensors") == verdict
    assert judge.verdict_on(tmp_path / "policy-4.safetensors", again=True).reward == 9.0


def test_policies_are_judged_without_running_anything(
    chosen: argparse.Namespace, task: ppo_task.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen.judge = "kept"
    cost = {"seconds": [1.0, 33.0], "before": {"rss": 1, "anonymous": 1}, "peak": {"rss": 3, "anonymous": 2}}
    folder = chosen.cache / "runs" / "costs" / chosen.dtype / "ours" / "0"
    folder.mkdir(parents=True)
    (folder / "exit.txt").write_text("0")
    (folder / "probe.json").write_text(json.dumps(cost | {"versions": {}, "threads": 1}))
    (folder / "policy-2.safetensors").touch()
    asked: list[Path | None] = []

    def verdict_on(snapshot: Path | None, *, again: bool) -> Verdict:
        asked.append(snapshot)
        return Verdict(1.0, 0.5)

    monkeypatch.setattr(ppo_task, "Judge", lambda task: argparse.Namespace(verdict_on=verdict_on))
    monkeypatch.setattr(ppo_turns, "run", None)
    contestants = [Contestant(label, Path(sys.executable), [], lambda *_: []) for label in ("ours", "never run")]

    results = ppo_turns.compete(contestants, task, chosen, "costs")

    assert list(results) == ["ours"] and asked == [None, folder / "policy-2.safetensors"]


@pytest.fixture(params=["bfloat16", "float32"])
def chosen(request: pytest.FixtureRequest, tmp_path: Path) -> argparse.Namespace:
    """A command line with either dtype."""
    return argparse.Namespace(
        model="some/Model",
        iterations=2,
        snapshots=4,
        turns=1,
        cache=tmp_path,
        only="",
        resume=False,
        judge=None,
        dtype=request.param,
    )


@pytest.fixture
def task(chosen: argparse.Namespace) -> ppo_task.Task:
    """The common task with two prompts, and no models."""
    made = ppo_task.Task(chosen.cache, chosen.dtype)
    ppo_task.write_lines(made.prompts, [{"prompt": [{"role": "user", "content": text}]} for text in ("a", "b")])
    return made


def flags(program: Sequence[str]) -> dict[str, str]:
    """The value after each `--name`."""
    return {key.removeprefix("--"): value for key, value in pairwise(program) if key.startswith("--")}


def test_a_recipe_is_told_the_dtype(chosen: argparse.Namespace, task: ppo_task.Task, tmp_path: Path) -> None:
    for contestant in (
        ppo_turns.ours(task, 2, "ours"),
        stages.contestant(chosen, tmp_path, "rm", False),
        overhead.ours(chosen, tmp_path, "sft"),
        padding.contestant(padding.PADDED, chosen, tmp_path),
    ):
        assert f"model.dtype={chosen.dtype}" in contestant.program(tmp_path, 0)


def test_the_programs_beside_ours_are_told_the_dtype(
    chosen: argparse.Namespace, task: ppo_task.Task, tmp_path: Path
) -> None:
    assert chosen.dtype in overhead.bare(chosen, tmp_path, "sft").program(tmp_path, 0)
    assert flags(ppo_vs_bare_loop.bare_loop(task, 2).program(tmp_path, 0))["dtype"] == chosen.dtype


@pytest.mark.parametrize("nf4", [False, True])
def test_swift_is_told_the_dtype(chosen: argparse.Namespace, task: ppo_task.Task, tmp_path: Path, nf4: bool) -> None:
    given = flags(ppo_vs_swift.swift(task, 2, tmp_path, "swift", rollout=8, nf4=nf4).program(tmp_path, 0))

    assert given["torch_dtype"] == chosen.dtype
    assert (given["bf16"], given["fp16"]) == (str(chosen.dtype == "bfloat16"), "False")
    assert given.get("bnb_4bit_compute_dtype") == (chosen.dtype if nf4 else None)


def test_trl_is_told_the_dtype(chosen: argparse.Namespace, task: ppo_task.Task, tmp_path: Path) -> None:
    *_, file = ppo_vs_trl.trl(task, 2, tmp_path, "TRL", rollout=8).program(tmp_path, 0)

    given = json.loads(Path(file).read_text())
    assert (given["dtype"], given["training"]["bf16"]) == (chosen.dtype, chosen.dtype == "bfloat16")


def test_llamafactory_is_told_the_dtype_and_its_autocast_too(
    chosen: argparse.Namespace, task: ppo_task.Task, tmp_path: Path
) -> None:
    contestant = ppo_vs_llamafactory.llamafactory(task, 2, tmp_path, "LLaMA-Factory", checkpointing=False)
    *launcher, file = contestant.program(tmp_path, 0)

    assert json.loads(Path(file).read_text())["bf16"] is (chosen.dtype == "bfloat16")
    assert (launcher == ["-m", "llamafactory.launcher"]) is (chosen.dtype == "bfloat16")
    assert chosen.dtype == "bfloat16" or Path(*launcher).is_file()


def test_tasks_and_runs_of_two_dtypes_lie_apart(
    chosen: argparse.Namespace, task: ppo_task.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(ppo_turns, "run", lambda contestant, folder, *_, **__: folders.append(folder))
    monkeypatch.setattr(ppo_turns, "result", lambda *_: Failure(""))
    monkeypatch.setattr(
        ppo_task, "Judge", lambda task: argparse.Namespace(verdict_on=lambda *_, **__: Verdict(0.0, 0.0))
    )
    same = Contestant("ours", Path(sys.executable), [], lambda folder, seed: [])
    ppo_turns.compete([same], task, chosen, "campaign")
    assert folders == [chosen.cache / "runs" / "campaign" / chosen.dtype / "ours" / "0"]

    ready = chosen.cache / f"task-model-{chosen.dtype}" / "ready"
    ready.parent.mkdir()
    ready.touch()
    assert ppo_task.prepare(chosen.cache, chosen.model, chosen.dtype) == ppo_task.Task(ready.parent, chosen.dtype)


def test_a_report_names_its_dtype(chosen: argparse.Namespace) -> None:
    short, other = ("bf16", "float32") if chosen.dtype == "bfloat16" else ("float32", "bf16")
    cost = turns.Probed([1.0, 2.0, 3.0], 1, 1, {}, 1)
    text = "\n".join(
        [
            *turns.header("Title", "stages", chosen, cost),
            *stages.table([stages.Row("sft", "", cost)], chosen.dtype),
            *padding.table({padding.PADDED: [stages.Row("ppo", "", cost)]}, chosen.dtype),
            *(stages.NOTES + overhead.NOTES + padding.NOTES),
        ]
    )

    assert text.startswith(f"# Title, in {short}\n") and f"--dtype {chosen.dtype}`, Model in {short}," in text
    assert f"| stage | in {short} |" in text and f"| micro-batches, {short} |" in text
    assert other not in text


def test_stages_are_compared_with_sft_at_equal_trained_layers_too(chosen: argparse.Namespace, tmp_path: Path) -> None:
    label, more = next(row for row in stages.STAGES.items() if "all layers" in row[0])

    program = stages.contestant(chosen, tmp_path, label.split(",")[0], False, *more).program(tmp_path, 0)

    assert program[1] == "recipes.ppo" and "trunk=0" in program


@pytest.mark.parametrize("rival", [ppo_vs_llamafactory, ppo_vs_swift, ppo_vs_trl, ppo_rewards])
def test_every_rival_stands_beside_ours_with_all_layers_trained(
    rival: Any, chosen: argparse.Namespace, task: ppo_task.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside: list[Contestant] = []
    chosen.judge = "kept"
    monkeypatch.setattr(rival, "options", lambda *_, **__: chosen)
    monkeypatch.setattr(rival, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(ppo_task, "prepare", lambda *_: task)
    monkeypatch.setattr(ppo_vs_llamafactory, "translate", lambda *_: None)
    monkeypatch.setattr(rival, "compete", lambda contestants, *_: beside.extend(contestants) or sys.exit())

    with pytest.raises(SystemExit):
        rival.main()

    programs = {one.label: one.program(task.folder, 0) for one in beside if not one.rival}
    assert all(("trunk=0" in program) == ("all layers" in label) for label, program in programs.items())
    assert {"ours, upper half", "ours, all layers"} <= {", ".join(label.split(", ")[:2]) for label in programs}
    assert not any(one.once for one in beside if one.label in programs), "ours run in every turn"


def test_a_scaled_reward_adapter_scores_as_many_times_as_much(tmp_path: Path) -> None:
    (tmp_path / "rm").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.json"):
        (tmp_path / "rm" / name).touch()
    (tmp_path / "rm" / "head.json").write_text(json.dumps({"mean": 3.0, "std": 2.0}))

    folder = reward_scale.scaled(tmp_path / "rm", 20.0, tmp_path / "copy")

    mean, std = json.loads((folder / "head.json").read_text()).values()
    assert (7.0 - mean) / std == 20.0 * (7.0 - 3.0) / 2.0


def test_what_ppo_learns_is_told_by_the_scale_of_its_reward() -> None:
    log = [{"explained_variance": 0.0, "reward": 0.0, "kl": 0.0}, {"eval_reward": 1.0}]
    log += [{"explained_variance": 0.5, "reward": 10.0, "kl": 0.7}]

    assert cells_of([reward_scale.row("function | x 20", [log], 20.0)])[0][2:] == ["0.50", "0.500", "0.70"]


def test_growth_is_told_by_the_token_and_drawn(tmp_path: Path) -> None:
    def cost(rows: int, length: int, anonymous: int) -> growth.Cost:
        return growth.Cost(rows, length, turns.Probed([9.0, 10.0, 12.0, 13.0], 0, anonymous, {}, 1))

    by_length = [cost(1, 128, 100), cost(1, 2048, 100 + 960)]
    by_rows = [cost(1, 256, 150), cost(2, 256, 260)]
    lines = growth.report(by_length, by_rows, "growth.svg")
    growth.draw(by_length, by_rows, tmp_path / "growth.svg")

    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    # a second for two micro-batches, the float32 logits of 50,000 words
    assert cells[0] == ["1 x 128", "100", "", "24", "3.9"]
    assert cells[1][:4] == ["1 x 2048", "1,060", "960", "390"]
    assert cells[3] == ["2 x 256", "260", "110", "97", "1.0"]
    assert any("grows by 0.50 MB a token" in line for line in lines)
    picture = (tmp_path / "growth.svg").read_text()
    assert "tokens of a micro-batch" in picture and "sequences of a micro-batch" in picture


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


def test_an_iteration_is_one_of_the_policys_steps_and_not_of_the_critics_pretraining(
    tiny_policy: Callable[..., Any], tmp_path: Path
) -> None:
    import torch

    from benchmarks.probe import Iterations

    policy = tiny_policy()
    policy.add_adapter("value", policy.peft_config["default"])
    named = dict(policy.named_parameters())
    critic, both = (
        torch.optim.SGD([p for name, p in named.items() if any(f".{role}." in name for role in roles)], lr=0.1)
        for roles in (["value"], ["default", "value"])
    )
    iterations = Iterations(tmp_path, 2, set())
    iterations.models.add(policy)

    for optimizer in (critic, critic, both, both, both):
        iterations._step(optimizer)

    assert len(iterations.seconds) == 1, "three steps of the policy, two an iteration"


@pytest.mark.slow
def test_rollouts_are_measured_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts on the embedded model; what cannot run here has a row that says so."""
    small = "--bases float32 --prompts 3 --prompt 4 --answer 4 --rounds 1"
    monkeypatch.setattr("benchmarks.turns.RESULTS", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["rollouts", *small.split()])
    rollouts.main()

    lines = (tmp_path / "rollouts.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| float32")]
    assert [row[1] for row in rows] == ["generate", "cuda_graphs", "continuous_batching"]
    assert rows[0][3] == "1.00" and all(float(rows[i][2].replace(",", "")) > 0 for i in (0, 2))
    assert rows[1][2:] == ["on a GPU alone", "-", "-", "-"]
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
        {"planned": 5 * 2**30, "tokens": 1536, "peak": 4 * 2**30, "halved": True},
        {"planned": 9 * 2**30, "tokens": 1536, "out_of_memory": True},
        {"planned": 5 * 2**30, "tokens": 1536, "failed": "ValueError: a | b"},
    ]

    rows = [gpu_cards.row(cell, result)[3:] for cell, result in zip(cells, results, strict=True)]

    assert rows == [
        ["sft", "yes", "4.00", "5.00", "yes", "512"],
        ["rm", "halved", "4.00", "5.00", "yes", "-"],
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


def test_the_best_of_ppos_checkpoints_by_a_second_measurement_is_marked_beside_the_one_that_was_kept() -> None:
    looks = [(42, 0.3), (84, 0.4)]
    log = [{"step": s, "eval_reward": 0.6, "eval_kl": 0.5, "eval_objective": o} for s, o in looks]
    again = {42: {"reward": [0.7, 0.1], "KL to SFT": [0.8, 0.04]}, 84: {"reward": [0.6, 0.1], "KL to SFT": [0.2, 0.02]}}

    rows = embedded.checkpoint_rows(3, {"objective": 0.3}, [{"step": 1, "kl": 0.1}, *log], again)

    first, last = cells_of(rows)
    assert first == ["3", "42", "0.600", "0.500", "0.300", "yes", "0.700", "0.800", "5.0%", "0.500", ""]
    assert last == ["3", "84", "0.600", "0.500", "0.400", "", "0.600", "0.200", "10.0%", "0.550", "yes"]


# Interruptions


def finished_stage(folder: Path, loss: float = 0.5, seconds: float = 1.0, weights: str = "w") -> Path:
    (folder / "value").mkdir(parents=True)
    names = ("adapter_model.safetensors", "value/head.json", "tokenizer.json")
    made = {"files": {name: {"bytes": 1, "sha256": weights} for name in names}}
    (folder / "manifest.json").write_text(json.dumps(made | {"status": "finished"}))
    (folder / "metrics.json").write_text("{}")
    rows = [
        {"loss": loss, "step": 1, "step_time": seconds, "num_tokens": 1},
        {"eval_loss": 0.5, "eval_runtime": seconds, "step": 1},
        {"train_runtime": seconds, "train_loss": seconds, "step": 1},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_interrupted_stage_is_compared_by_all_but_times(tmp_path: Path) -> None:
    whole, same = (interruptions.left(finished_stage(tmp_path / str(s), seconds=s)) for s in (1.0, 2.0))
    assert whole == same and {"adapter_model.safetensors", "value/head.json", "metrics.json"} < {*whole}
    assert interruptions.left(finished_stage(tmp_path / "loss", loss=0.6)) != whole
    assert interruptions.left(finished_stage(tmp_path / "weights", weights="v")) != whole


def test_the_table_of_interruptions_counts_what_differs_and_says_where() -> None:
    case = interruptions.Case("ppo", "nf4", "last")
    fine = interruptions.Repeat(case, 2.0, "training", ())
    figure = interruptions.Repeat(case, 3.0, "final evaluation", ("metrics.json",))
    failed = interruptions.Repeat(case, 4.0, "loading", ("exit code 2: no",))
    told = interruptions.report([fine, figure, failed], 60)
    assert "| ppo | nf4 | 3 | 1 | 1 | 1 | 2 of 3 | 1 of 3 |" in told and "1 of 3 are equal" in told
    assert "killed after 3.00 s in final evaluation: metrics.json" in told
