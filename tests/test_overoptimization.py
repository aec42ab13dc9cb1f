"""Ensembles, guard and curves by the command line, on the embedded base: a sweep of reward models and what uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import done, run

from recipes.overoptimization import BETAS, parse
from rlhf_recipes import world
from rlhf_recipes.errors import UserError
from rlhf_recipes.guard import curves

ROOT = Path(__file__).parents[1]
STEPS = ["training.max_steps=4", "training.eval_steps=2", "training.save_steps=2"]
FEW = ["evaluation.prompts=4", "evaluation.samples=1"]
ONLY_FEW = [
    "guard.prompts=8",
    "guard.samples=2",
    "guard.root_kl_step=0",
    "training.value_pretraining_passes=0",
    "reward.min_accuracy=0",
]


pytestmark = pytest.mark.usefixtures("terminal_left_alone")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Overrides of a run with an SFT stage, a reward model, and a sweep of two more."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in world.rankings(0)["train"][:24]))
    overrides = ["experiment=smoke", f"runs_dir={folder}", f"data.preferences.path={pairs}", "run=mine", *FEW]
    done("sft", *overrides)
    done("rm", *overrides)
    done("rm", "-m", *overrides, "seed=1,2")
    return overrides


def of_run(shared):
    return Path(next(o for o in shared if o.startswith("runs_dir=")).partition("=")[2]) / "mine"


@pytest.mark.slow
def test_a_sweep_of_reward_models_is_an_ensemble_and_one_of_them_the_guard(shared):
    rm = of_run(shared) / "rm"
    ensemble = [f"reward.model=[run,{rm}/seed=1]", "reward.ensemble=worst"]
    guard = ["guard=reward_model", "guard.min_accuracy=0"]
    code, output = run("ppo", *shared, *STEPS, *ONLY_FEW, *ensemble, *guard, f"guard.model={rm}/seed=1")
    assert code == 2 and f"guard.model: {rm}/seed=1 is {rm}/seed=1 of reward.model, which PPO optimizes" in output
    done("ppo", *shared, *STEPS, *ONLY_FEW, *ensemble, *guard, f"guard.model={rm}/seed=2")
    made = of_run(shared) / "ppo"
    manifest = json.loads((made / "manifest.json").read_text())
    fingerprints = {
        name: json.loads((rm / name / "manifest.json").read_text())["fingerprint"] for name in ("", "seed=1")
    }
    assert manifest["predecessors"]["rm"] == fingerprints[""]
    assert manifest["predecessors"][str(rm / "seed=1")] == fingerprints["seed=1"]
    points = json.loads((made / "guard.json").read_text())["points"]
    assert [point["step"] for point in points] == [0, 2, 4]
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["guard"] == max(p["score"] for p in points[1:]) and metrics["kept"] == "best of 2 looks"
    assert "| kept | best of 2 looks |" in (made / "README.md").read_text()


@pytest.mark.slow
def test_dpo_is_guarded_too(shared):
    settings = ["guard=gold", "guard.prompts=8", "guard.samples=2", "guard.stop=true", "training.beta=0.01"]
    done("dpo", *shared, *STEPS, *settings)
    made = of_run(shared) / "dpo"
    points = json.loads((made / "guard.json").read_text())["points"]
    assert [point["step"] for point in points] == [0, 2, 4]
    assert points[0]["kl"] == 0 < points[-1]["kl"] and points[0]["reward"] == 0 != points[-1]["reward"]
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["over_optimized"] is metrics["stopped"] is None


@pytest.mark.slow
def test_curves_are_drawn_and_what_is_finished_is_not_made_again(shared):
    arguments = ["beta=0,0.25", *shared, "--ppo", *STEPS, *ONLY_FEW, "guard=gold"]
    command = [sys.executable, "-m", "recipes.overoptimization", *arguments]  # which starts processes of its own
    first, second = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
    folder = of_run(shared) / "overoptimization"
    points = json.loads((folder / "metrics.json").read_text())["points"]
    assert [(p["beta"], p["step"]) for p in points] == [(beta, step) for beta in (0, 0.25) for step in (0, 2, 4)]
    assert all(p.keys() == {"beta", "seed", "step", "kl", "reward", "gold"} for p in points)
    assert (folder / curves.PICTURE).read_text().count("beta") >= 2
    assert (second.stdout + second.stderr).count("unchanged: skipped") == 4


# ---- without training


def test_common_overrides_go_to_every_stage_and_own_ones_to_one():
    betas, overrides = parse(["beta=0,0.1", "run=mine", "--rm", "a=1", "--ppo", "b=2"])
    assert betas == ["0", "0.1"]
    assert overrides["sft"] == ["run=mine"] and overrides["rm"] == ["run=mine", "a=1"]
    assert overrides["ppo"] == ["run=mine", "b=2", "experiment=ppo_overoptimization", "guard=gold"]


def test_an_experiment_and_a_guard_of_ones_own_are_kept():
    assert parse(["experiment=smoke", "--ppo", "guard=url"])[1]["ppo"] == ["experiment=smoke", "guard=url"]
    assert parse([])[0] == BETAS.split(",")


@pytest.mark.parametrize("beta", ["0", "0,0", "a,b", "-1,0", ""])
def test_betas_that_make_no_curves_are_refused(beta):
    with pytest.raises(UserError, match="want two numbers of 0 or more"):
        parse([f"beta={beta}"])


def test_the_table_tells_where_gold_was_best_and_where_it_ended():
    figures = [(0, 0.0, 0.0, 0.6), (4, 1.0, 0.5, 0.8), (8, 9.0, 1.5, 0.3)]
    points = [
        curves.CurvePoint(beta=0.1, seed=0, step=step, kl=kl, reward=reward, gold=gold)
        for step, kl, reward, gold in figures
    ]
    header, row = curves.table(points).splitlines()
    assert " ".join(header.split()) == "beta best gold at KL reward gold at the end KL reward then"
    assert row.split() == ["0.1", "0.8", "1", "0.5", "0.3", "9", "1.5"]
