"""What a training says to dashboards: all three of the documents, offline, from a real PPO stage."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_recipes.config import compose
from rlhf_recipes.errors import UserError

ROOT = Path(__file__).parents[1]
STANDARD = {  # the names under which others log the same
    *("reward", "reward_std", "kl", "entropy", "clip_ratio/region_mean", "learning_rate", "grad_norm"),
    *("completions/mean_length", "num_tokens", "value_loss", "explained_variance"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A PPO stage on a function, reporting to all of them: its folder, and where Trackio and W&B write."""
    folder = tmp_path_factory.mktemp("dashboards")
    (folder / "rewards.py").write_text(
        "def words(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    environment = os.environ | {
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    made = subprocess.run(
        [
            *(sys.executable, "-m", "recipes.ppo", "experiment=smoke", f"runs_dir={folder}", "start=model"),
            *("reward=function", f"reward.functions=[{folder}/rewards.py:words]", "evaluation.prompts=8"),
            *("training.value_pretraining_passes=0", "training.logging_steps=1"),
            "training.report_to=[tensorboard,trackio,wandb]",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    return folder


def test_tensorboard_gets_ppos_figures_under_their_standard_names(told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (told / "smoke/ppo/checkpoints/runs").rglob("events.out.*")
    seen = EventAccumulator(str(events))
    seen.Reload()
    assert {f"train/{name}" for name in STANDARD} <= {*seen.Tags()["scalars"]}
    assert {"eval/reward", "eval/objective"} <= {*seen.Tags()["scalars"]}
    steps = [event.step for event in seen.Scalars("train/reward")]
    assert steps == [1, 3], "once an iteration, which is two optimizer steps"


def test_trackio_gets_them_under_the_runs_name(told):
    (database,) = (told / "trackio").glob("rlhf-recipes*.db")
    rows = sqlite3.connect(database).execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in rows} == {"smoke/ppo"}
    assert {f"train/{name}" for name in STANDARD} <= {key for _, metrics in rows for key in json.loads(metrics)}


def test_weights_and_biases_keeps_them_for_a_later_sync(told):
    (kept,) = (told / "wandb").glob("offline-run-*/*.wandb")
    content = kept.read_bytes()
    assert all(f"train/{name}".encode() in content for name in STANDARD)


def test_a_dashboard_that_is_not_installed_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("rlhf_recipes.config.options.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"training.report_to=wandb: it is not installed: \.venv/bin/pip install wandb"):
        compose("sft", ["training.report_to=[wandb]"])
    compose("sft", ["training.report_to=none"])
