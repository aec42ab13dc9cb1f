"""A finished stage is opened again after a change: one that matters is refused or told, any other is of no account."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from rlhf_recipes import data, world
from rlhf_recipes.config import compose
from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import Stage

PARTS = {"sft": "sft", "rm": "preferences", "dpo": "preferences", "ppo": "prompts"}
BEFORE = {"sft": (), "rm": ("sft",), "dpo": ("sft",), "ppo": ("sft", "rm")}
OVERRIDES = (
    *("run=m", "runs_dir=runs", "data=files", "data.sft.path=sft.jsonl", "data.preferences.path=pairs.jsonl"),
    *("data.prompts.path=prompts.jsonl", "model.name_or_path=base", "model.chat_template=chat.jinja"),
)
REWARD = ["reward.functions=[{path: rewards.py:brevity, weight: 2}]"]


def lines(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(numbers):
    return [{"prompt": f"question {n}", "chosen": " yes", "rejected": " no"} for n in numbers]


@pytest.fixture(scope="module")
def configs():
    """The config of each stage."""
    return {stage: compose(stage, [*OVERRIDES, *(REWARD if stage == "ppo" else [])]) for stage in PARTS}


class Run:
    """A run in the working directory, whose stages can be opened with changes to their configs."""

    def __init__(self, configs):
        self.configs = configs

    def open(self, stage, **changes):
        cfg = self.configs[stage].copy()
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
        read = data.describe(cfg.data, PARTS[stage])
        return Stage.open(cfg, stage, predecessors=BEFORE[stage], data_fingerprint=read, overrides=["run=m"])

    def make(self, stage, weights="w", mean=0.0, **changes):
        with self.open(stage, **changes) as opened:
            opened.check_base("b1")
            (opened.saving / "adapter_model.safetensors").write_text(weights)
            if stage == "rm":
                (opened.saving / "head.json").write_text(json.dumps({"mean": mean, "std": 1.0}))
            opened.finish({})


@pytest.fixture(scope="module")
def made(configs, tmp_path_factory):
    """A folder with data, a base, and a run whose stages are all finished."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        lines("sft.jsonl", [{"prompt": f"question {n}", "completion": " yes"} for n in range(40)])
        lines("pairs.jsonl", pairs(range(20, 60)))
        lines("prompts.jsonl", [{"prompt": f"question {n}"} for n in range(60)])
        Path("chat.jinja").write_text("{{ messages }}")
        Path("rewards.py").write_text("def brevity(completions, **_):\n    return [1.0] * len(completions)\n")
        shutil.copytree(world.BASE, "base")
        for stage in PARTS:
            Run(configs).make(stage)
    return folder


@pytest.fixture
def run(configs, made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Run(configs)


def edit(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def scale_a_layer(run):
    """Of the base, one matrix of one layer."""
    tensors = load_file("base/model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, "base/model.safetensors", {"format": "pt"})


def other_version(run):
    path = Path("runs/m/sft/manifest.json")
    told = json.loads(path.read_text())
    told["versions"] |= {"trl": "1.0.0", "transformers": "4.0"}
    path.write_text(json.dumps(told))


def begin_sft_again(run):
    run.open("sft", overwrite=True).close()


# What has changed, how, the stage that is opened, what is set otherwise there, and what is said.
MATTERS = {
    "a chat template's file": (
        *(lambda run: edit("chat.jinja", "messages", "messages[0]"), "sft", {}),
        r"model.chat_template: contents \w+ -> contents \w+",
    ),
    "the source of a reward function": (
        *(lambda run: edit("rewards.py", "1.0", "-1.0"), "ppo", {}),
        r"reward.functions.0.path: contents \w+:brevity -> contents \w+:brevity",
    ),
    "weights of one layer of the base": (scale_a_layer, "sft", {}, "model.name_or_path: contents"),
    "the tokenizer of the base": (
        *(lambda run: edit("base/tokenizer_config.json", "{", '{"x": 1,'), "sft", {}),
        "model.name_or_path: contents",
    ),
    "the weights of the stage before": (
        *(lambda run: run.make("sft", "other", overwrite=True), "rm", {}),
        r"made again since, sft: \w+ -> \w+",
    ),
    "the scale of the reward model": (
        *(lambda run: run.make("rm", mean=5.0, overwrite=True), "ppo", {}),
        r"made again since, rm: \w+ -> \w+",
    ),
    "the stage before, begun again": (begin_sft_again, "rm", {}, "sft was begun again and is unfinished"),
    "its data": (lambda run: edit("sft.jsonl", "yes", "no"), "sft", {}, r"data.sources.0.files.0: \d+ bytes"),
    "data of another stage, which hold out other prompts": (
        *(lambda run: lines("pairs.jsonl", pairs(range(30))), "sft", {}),
        r"What other stages read has changed \(preferences.0.files.0\)",
    ),
    "versions": (other_version, "sft", {}, r"Versions have changed: transformers: 4.0 -> 5[.\d]+, trl: 1.0.0 -> 1.16"),
    "an option": (lambda run: None, "sft", {"training__learning_rate": 1.0}, "training.learning_rate: .* -> 1.0"),
    "the prompts held out": (lambda run: None, "rm", {"data__heldout": 5}, "data.heldout: 0.1 -> 5"),
    "the rows of a batch": (
        *(lambda run: None, "sft", {"training__per_device_train_batch_size": 4}),
        r"training.gradient_accumulation_steps x per_device_train_batch_size: 32 -> 16",
    ),
    "the episodes of an iteration": (
        *(lambda run: None, "ppo", {"training__steps_per_generation": 8}),
        r"training.steps_per_generation x per_device_train_batch_size: \(not set\) -> 64",
    ),
    "an end of turn that SFT did not have": (lambda run: None, "rm", {"model__eos_token": "<x>"}, "model.eos_token"),
}


@pytest.mark.parametrize("change", MATTERS)
def test_a_finished_stage_is_not_skipped_in_silence_after_a_change_of(run, change):
    make, stage, changes, told = MATTERS[change]
    make(run)
    try:
        opened = run.open(stage, **changes)
    except UserError as refused:
        said = str(refused)
    else:
        said = opened.message.partition("\n")[2]
    assert re.search(told, said), said or "nothing was said"


HARMLESS = {
    "the size of micro-batches": (
        *(None, "sft", {"training__per_device_train_batch_size": 4, "training__gradient_accumulation_steps": 8}),
    ),
    "the size of PPO's micro-batches": (
        *(None, "ppo", {"training__per_device_train_batch_size": 4, "training__gradient_accumulation_steps": 8}),
    ),
    "an option to its default": (None, "sft", {"training__weight_decay": 0.0}),
    "checkpointing": (None, "dpo", {"training__gradient_checkpointing": False}),
    "the batch of the final evaluation": (None, "ppo", {"evaluation__batch_size": 3}),
    "a path to an absolute one": (None, "rm", {"data__preferences__path": "{here}/pairs.jsonl"}),
    "another name of the same template": (
        *(lambda run: shutil.copy("chat.jinja", "same.jinja"), "sft", {"model__chat_template": "same.jinja"}),
    ),
    "another folder of the same model": (lambda run: Path("base").rename("b"), "sft", {"model__name_or_path": "b"}),
    "the stage before, made again to the same weights": (*(lambda run: run.make("sft", overwrite=True), "rm", {}),),
    "dates of files": (lambda run: [Path(f).touch() for f in ("sft.jsonl", "rewards.py", "chat.jinja")], "ppo", {}),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_a_finished_stage_is_skipped_after_a_change_of(run, change):
    make, stage, changes = HARMLESS[change]
    if make:
        make(run)
    changes = {k: v.format(here=Path.cwd()) if isinstance(v, str) else v for k, v in changes.items()}
    opened = run.open(stage, **changes)
    assert opened.state == "skip" and "\n" not in opened.message


@pytest.mark.parametrize("changes", [{"model__chat_template": None}, {"model__pad_token": "<x>"}])
def test_a_later_stage_has_the_template_and_the_special_tokens_of_the_first(run, changes):
    with pytest.raises(UserError, match=r"sft was made with another base or adapter, or other tokens(.|\n)*model\."):
        run.open("rm", overwrite=True, **changes)


def test_a_later_stage_has_the_base_of_the_first(run):
    scale_a_layer(run)
    with pytest.raises(UserError, match=r"sft was made with another base(.|\n)*model.name_or_path: contents"):
        run.open("rm", overwrite=True)


def unfinished(run):
    with run.open("sft", overwrite=True) as stage:
        stage.check_rows(data.load(run.configs["sft"].data, "sft", 0))
        folder = stage.checkpoints_dir / "checkpoint-8"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 8}')


def test_a_resume_goes_on_with_the_rows_it_began_with_or_not_at_all(run):
    """What another stage reads is no matter unless it holds out what this one would learn."""
    unfinished(run)
    lines("pairs.jsonl", pairs(range(30)))
    with run.open("sft") as stage, pytest.raises(UserError, match="was begun with other rows"):
        stage.check_rows(data.load(run.configs["sft"].data, "sft", 0))
    lines("pairs.jsonl", pairs(range(100, 140)))
    with run.open("sft") as stage:
        stage.check_rows(data.load(run.configs["sft"].data, "sft", 0))
        assert stage.state == "resume" and "\n" not in stage.message


def test_a_resume_tells_that_versions_have_changed(run):
    unfinished(run)
    other_version(run)
    with run.open("sft") as stage:
        assert stage.message.count("\n") == 1 and "trl: 1.0.0 -> 1.16" in stage.message


def test_data_of_the_hub_without_a_revision_are_told(run):
    """Whether they changed could be told by the hub alone."""
    hub = {"path": "trl-lib/some", "split": "train"}
    run.make("sft", overwrite=True, data__sft=hub)
    assert "Whether trl-lib/some changed on the hub is not looked up" in run.open("sft", data__sft=hub).message
    hub |= {"revision": "0123456"}
    run.make("sft", overwrite=True, data__sft=hub)
    assert "\n" not in run.open("sft", data__sft=hub).message


def test_a_model_of_the_hub_is_known_by_what_lies_in_the_cache(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: "base/config.json")
    named = {"model__name_or_path": "org/model"}
    run.make("sft", overwrite=True, **named)
    assert run.open("sft", **named).state == "skip"
    scale_a_layer(run)
    with pytest.raises(UserError, match=r"model.name_or_path: contents"):
        run.open("sft", **named)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    assert run.open("sft", **named).state == "skip"  # not here any more
