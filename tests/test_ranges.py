"""The numbers that options allow: refused at composition, before data or a model is loaded."""

import pytest

from rlhf_recipes.config import compose
from rlhf_recipes.config.options import RECIPES, options
from rlhf_recipes.config.ranges import RANGES, fault
from rlhf_recipes.errors import UserError


def test_every_rule_is_of_an_option_and_allows_its_default() -> None:
    known = {key: option for recipe in RECIPES for key, option in options(recipe).items()}
    assert {key for key in RANGES if key not in known and key != "training.data_seed"} == set()
    refused = {key for key in RANGES if key in known and fault(key, known[key].value)}
    assert refused <= {"training.data_seed"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.temperature=0", "training.temperature=0: must be above 0"),
        ("training.max_completion_length=0", "training.max_completion_length=0: must be at least 1"),
        ("training.max_completion_length=null", "training.max_completion_length=None: expected int"),
        ("training.learning_rate=-1", "training.learning_rate=-1: must be above 0"),
        ("training.learning_rate=1e400", "training.learning_rate=inf: must be finite"),
        ("training.learning_rate=nan", "training.learning_rate=nan: must be finite"),
        ("training.save_steps=0", "training.save_steps=0: must be above 0"),
        ("training.max_steps=0", "training.max_steps=0: must be -1 or at least 1"),
        ("training.kl_horizon=0", "training.kl_horizon=0: must be at least 1"),
        ("training.cliprange_value=-0.2", "training.cliprange_value=-0.2: must be above 0"),
        ("training.gamma=1.5", "training.gamma=1.5: must be at least 0 and at most 1"),
        ("training.adam_beta2=1", "training.adam_beta2=1: must be at least 0 and below 1"),
        ("lora.r=0", "lora.r=0: must be at least 1"),
        ("lora.r=-4", "lora.r=-4: must be at least 1"),
        ("lora.lora_dropout=2", "lora.lora_dropout=2: must be at least 0 and below 1"),
        ("trunk=1", "trunk=1: must be at least 0 and below 1"),
        ("seed=-1", "seed=-1: must be at least 0 and below 4294967296"),
        ("evaluation.samples=0", "evaluation.samples=0: must be at least 1"),
        ("reward.weights=[1,inf]", "reward.weights=[1, inf]: must be finite"),
    ],
)
def test_a_number_that_cannot_work_is_refused_with_option_value_and_what_is_allowed(override: str, told: str) -> None:
    with pytest.raises(UserError) as refusal:
        compose("ppo", [override])
    assert [line.strip() for line in str(refusal.value).splitlines()[1:-1]] == [told]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.max_steps", -1),
        ("training.save_steps", 0.25),
        ("training.top_p", 1.0),
        ("training.pad_to_multiple_of", "auto"),
        ("training.kl_budget", None),
        ("eval.best_of", [2, 64]),
        ("training.fp16", False),
    ],
)
def test_what_is_allowed_has_no_fault(key: str, value: object) -> None:
    assert fault(key, value) is None


def test_one_of_a_list_is_enough_for_a_fault() -> None:
    assert fault("eval.best_of", [4, 1]) == "must be at least 2"
