"""What a library refuses while it builds something becomes one line that names the options."""

import re
from typing import Any

import pytest

from rlhf_recipes.config.refusals import told
from rlhf_recipes.errors import UserError

LIBRARY = """
class SomeTrainer:
    def __init__(self, wrong):
        if wrong:
            raise ValueError("no such  thing")

    def create_optimizer(self):
        raise ImportError("needs optim of galore")

    def step(self):
        raise ValueError("in training")
"""


@pytest.fixture
def trainer() -> Any:
    """A class of a package that is not ours."""
    names: dict[str, Any] = {"__name__": "somelib.trainer"}
    exec(LIBRARY, names)
    return names["SomeTrainer"]


def refusal(overrides: list[str], call: Any) -> str:
    with pytest.raises(UserError) as refused, told(overrides):
        call()
    return str(refused.value)


def test_an_adapter_that_peft_refuses_is_told_with_the_option(tiny_llama: Any) -> None:
    from peft import LoraConfig, get_peft_model

    line = refusal(
        ["run=mine", "lora.r=4", "+lora.target_modules=nothing"],
        lambda: get_peft_model(tiny_llama(), LoraConfig(target_modules=["nothing"])),
    )
    assert re.match(r"lora\.target_modules=nothing: peft refuses: Target modules .*nothing", line)


def test_what_a_trainers_constructor_refuses_is_told_with_what_was_set_of_its_section(trainer: Any) -> None:
    line = refusal(["training.a=1", "training.b=2", "lora.r=3"], lambda: trainer(True))
    assert line == "training.a=1, training.b=2: somelib refuses: no such thing"
    assert refusal([], lambda: trainer(True)) == "training: somelib refuses: no such thing"


def test_what_an_optimizer_refuses_is_told_with_the_option_that_it_mentions(trainer: Any) -> None:
    line = refusal(["training.optim=x", "training.b=2"], trainer(False).create_optimizer)
    assert line == "training.optim=x: somelib refuses: needs optim of galore"


def test_any_other_error_stays_what_it_is(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^in training$"), told(["training.a=1"]):
        trainer(False).step()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ImportError), told([]):
        trainer(False).create_optimizer()
