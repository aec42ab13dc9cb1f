"""The options of the recipes, and what a person is told about them."""

import pytest

from rlhf_recipes.config import compose, schema
from rlhf_recipes.config.options import (
    NOT_IN_PPO,
    TRAINING,
    conflicts,
    options,
    overview,
    reference,
    required,
    unknown,
)
from rlhf_recipes.errors import UserError


def test_every_recipe_has_the_options_of_its_trainer_of_lora_and_of_bitsandbytes() -> None:
    for recipe, (training, own) in {
        "sft": ("packing", "neftune_noise_alpha"),
        "rm": ("center_rewards_coefficient", "learning_rate"),
        "dpo": ("precompute_ref_log_probs", "beta"),
        "ppo": ("value_learning_rate", "epsilon"),
    }.items():
        expected = {f"training.{training}", f"training.{own}", "training.optim", "lora.use_dora", "run", "trunk"}
        assert expected | {"quantization.bnb_4bit_quant_storage", "model.dtype", "data.heldout"} <= {*options(recipe)}
    assert [recipe for recipe in TRAINING if "reward.model" in options(recipe)] == ["ppo"]


def test_the_projects_own_options_without_a_default_need_a_value() -> None:
    own = ["run", "runs_dir", "overwrite", "seed", "start", "trunk", "frozen_top", "model.name_or_path"]
    assert required("ppo") == own


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learnin_rate", "training.learning_rate"),
        ("learning_rate", "training.learning_rate"),
        ("lora.rank", "lora.r"),
        ("quantization.bnb_4bit_quant_typ", "quantization.bnb_4bit_quant_type"),
        ("modle", "model"),
        ("hardwre", "hardware"),
        ("model.revison", "model.revision"),
        ("bets", None),
        ("qqqqqqqq", None),
    ],
)
def test_an_unknown_key_gets_the_nearest_one_or_none(key: str, nearest: str | None) -> None:
    expected = f"no such option; did you mean {nearest}?" if nearest else "no such option"
    assert unknown("sft", key) == expected


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["quantization=int8", "quantization.load_in_4bit=true"], "load_in_4bit and load_in_8bit exclude each other"),
        (["quantization=int8", "quantization.bnb_4bit_use_double_quant=true"], "only with 4 bits"),
        (["quantization.bnb_4bit_quant_type=nf4"], "only with 4 bits; add quantization=nf4"),
        (["quantization=nf4", "quantization.llm_int8_threshold=5"], "only with 8 bits"),
        (["training.fp16=true", "training.bf16=true"], "exclude each other"),
        (["trunk=0.5", "frozen_top=0.5"], "frozen_top=0.5: must be below 1 together with trunk"),
        (["training.report_to=nonsense"], "report_to=nonsense: expected one of azure_ml, comet_ml, .*, all, none"),
        (["training.report_to=[none,wandbb]"], "report_to=wandbb: expected one of"),
        (["evaluation.prompts=0"], "add training.eval_strategy=no"),
        (["reward=function"], "set reward.model, reward.functions or reward.url"),
        (
            ["lora.init_lora_weights=pissa_niter_4"],
            "lora.init_lora_weights=pissa_niter_4: it changes the base's weights",
        ),
        (["lora.bias=all"], "lora.bias=all: it trains the base's own biases"),
        (["training.gradient_checkpointing_kwargs={use_reentrant:true}"], "gives no gradients above frozen layers"),
    ],
)
def test_impossible_combinations_are_refused(overrides: list[str], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        compose("ppo", overrides)


def test_what_fits_together_is_no_conflict() -> None:
    assert conflicts({}) == []
    assert conflicts({"quantization.load_in_4bit": True, "quantization.bnb_4bit_quant_type": "nf4", "trunk": 0.5}) == []
    assert conflicts({"reward.model": None, "reward.url": "http://localhost"}) == []


def test_the_overview_shows_null_and_true_as_they_are_typed() -> None:
    text = overview("sft", "Story.", {"training.packing": True, "run": "mine"}, {"lora": ["default"]})
    assert text.startswith("Story.\n")
    assert "\n  training.packing = true\n" in text
    assert "\n  model.revision = null\n" in text
    assert "\n  lora          default\n" in text


def test_the_reference_shows_type_default_help_and_allowed_values() -> None:
    text = reference("sft", "packing_strategy")
    assert text.startswith("training.packing_strategy: str = 'bfd'\n    ")
    assert "One of: bfd, bfd_split, wrapped." in text
    assert reference("sft", "no such word") == "No option of sft has 'no such word' in its name or help.\n"


@pytest.mark.parametrize("name", NOT_IN_PPO)
def test_an_option_that_does_nothing_in_ppo_is_refused_with_the_reason_and_not_listed(name: str) -> None:
    assert name in schema.options(TRAINING["ppo"]), "an option no more"
    assert f"training.{name}" not in options("ppo")
    assert f"\ntraining.{name}:" not in f"\n{reference('ppo', name)}"
    with pytest.raises(UserError) as refusal:
        compose("ppo", [f"training.{name}=1"])
    assert f"training.{name}=1: no meaning in PPO: {NOT_IN_PPO[name]}" in str(refusal.value)
