"""Every file in conf/ is found and composed, and what it sets is what the config classes know."""

import re
from pathlib import Path

import pytest

from rlhf_recipes.config import CONF, compose, schema
from rlhf_recipes.config.options import GROUPS, ONLY, RECIPES, TRAINING, groups, options

FILES = sorted(CONF.rglob("*.yaml"))
OWN_DATA = ["data.sft.path=a.jsonl", "data.preferences.path=b.jsonl", "data.prompts.path=c.jsonl"]
NEEDED = {
    "data/files": OWN_DATA,
    "data/capybara": OWN_DATA[1:],  # demonstrations only
    "model/other": ["model.name_or_path=org/model"],
    "judge/endpoint": ["judge.url=http://localhost:8000/v1", "judge.model=qwen"],
    "judge/local": ["judge.model=org/model"],
    "judge/reward_model": ["judge.reward_model=runs/other/rm"],
    "judge/function": ["judge.function=rewards.py:brevity"],
    "guard/function": ["guard.functions=[rewards.py:brevity]"],
    "guard/reward_model": ["guard.model=runs/other/rm"],
    "guard/url": ["guard.url=http://localhost:8000"],
    "reward/function": ["reward.functions=[rewards.py:brevity]"],
    "reward/url": ["reward.url=http://localhost:8000"],
}


def commands(file: Path) -> list[tuple[str, list[str]]]:
    """Recipes and overrides that take this file in."""
    name = str(file.relative_to(CONF).with_suffix(""))
    folder, _, choice = name.rpartition("/")
    if not folder:
        if choice == "guarded":
            return [(recipe, ["guard=gold"]) for recipe in ONLY["guard"]]
        return [(recipe, []) for recipe in RECIPES if choice in (recipe, "common")]
    if folder.count("/"):  # sft/model/embedded.yaml: what a recipe trains differently
        recipe, group = folder.split("/")
        return [(recipe, [f"{group}={choice}"])]
    recipes = [recipe for recipe in RECIPES if choice.startswith(f"{recipe}_")] or list(RECIPES)
    recipes = [recipe for recipe in recipes if folder in groups(recipe)]
    return [(recipe, [f"{folder}={choice}", *NEEDED.get(name, [])]) for recipe in recipes]


def test_the_search_for_config_files_finds_them() -> None:
    assert len(FILES) > 35
    assert {file.relative_to(CONF).parts[0] for file in FILES if file.parent != CONF} == {*GROUPS, *TRAINING}
    assert {file.stem for file in FILES if file.parent == CONF} == {"common", "guarded", *RECIPES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_a_file_composes_in_every_recipe_it_is_for(file: Path) -> None:
    taken = commands(file)
    assert taken
    for recipe, overrides in taken:
        compose(recipe, overrides)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_a_file_gives_reasons(file: Path) -> None:
    assert "# " in file.read_text().replace("# @package", "")


@pytest.mark.parametrize("recipe", TRAINING)
def test_no_file_repeats_a_default_of_the_library(recipe: str) -> None:
    cfg = compose(recipe, ["model=qwen2.5-0.5b"])
    repeated = {key for key, value in cfg.training.items() if schema.options(TRAINING[recipe])[str(key)].value == value}
    wanted = {"per_device_train_batch_size", "learning_rate", "per_device_eval_batch_size"}
    assert repeated <= wanted, "two that a reader wants to see, and one that follows another"


@pytest.mark.parametrize("card", ["8gb", "12gb", "16gb", "24gb"])
@pytest.mark.parametrize("recipe", TRAINING)
def test_a_card_changes_no_batch(recipe: str, card: str) -> None:
    def batch(*overrides: str) -> int:
        training = compose(recipe, ["model=qwen2.5-1.5b", *overrides]).training
        assert not {"steps_per_generation", "generation_batch_size"} & {*training}, "PPOConfig keeps 128 episodes"
        known = schema.options(TRAINING[recipe])
        rows, portions = (
            training.get(name, known[name].value)
            for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        return rows * portions

    assert batch(f"hardware={card}") == batch()


def test_every_key_that_a_comment_names_exists() -> None:
    known = {key for recipe in RECIPES for key in options(recipe)} | {*GROUPS}
    for file in FILES:
        for line in file.read_text().splitlines():
            for key in re.findall(r"(?<![\w.])([a-z_]+(?:\.[a-z_0-9]+)*)=", line.partition("#")[2]):
                top = ".".join(key.split(".")[:2])
                assert key in known or top in known or key in ("ARGS",), f"{file.name}: {key}"
