"""What is read from the source of the config classes, held against the real classes."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING, OmegaConf

from rlhf_recipes.config import build, schema
from rlhf_recipes.config.options import sections

CLASSES = [
    "trl.SFTConfig",
    "trl.RewardConfig",
    "trl.DPOConfig",
    "rlhf_recipes.ppo.config.PPOConfig",
    "peft.LoraConfig",
    "transformers.BitsAndBytesConfig",
]


def real(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def real_defaults(cls: Any) -> dict[str, Any]:
    if "Config" in cls.__name__ and not cls.__name__.startswith("BitsAndBytes"):
        return {
            field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(cls)
            if field.init
        }
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


@pytest.mark.parametrize("path", CLASSES)
def test_names_and_literal_defaults_are_those_of_the_real_class(path: str) -> None:
    defaults = real_defaults(real(path))
    options = schema.options(path)
    assert set(options) == set(defaults)
    literal = {name: option.value for name, option in options.items() if option.value != MISSING}
    assert literal == {name: defaults[name] for name in literal}
    assert len(options) - len(literal) <= 4, "nearly all defaults are literals"


@pytest.mark.parametrize("path", CLASSES)
def test_an_untouched_node_builds_what_the_class_builds_without_arguments(path: str) -> None:
    cls = real(path)
    node = schema.node(schema.options(path), {}, defaults=False)
    device = {"use_cpu": True} if "use_cpu" in schema.options(path) else {}  # else TRL's bf16 wants a GPU
    built, bare = build(cls, node, **device), cls(**device)
    assert built == bare
    if path == "transformers.BitsAndBytesConfig":  # its equality looks at one field
        assert built.to_dict() == bare.to_dict()


@pytest.mark.parametrize("path", CLASSES)
def test_every_option_has_a_help_text_and_accepts_its_own_default(path: str) -> None:
    for option in schema.options(path).values():
        assert len(option.help) > 5, option.name
        if option.value != MISSING:
            assert option.accept(option.value) == option.value


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from rlhf_recipes.config import schema; "
        f"[schema.options(path) for path in {CLASSES}]; "
        "print(*{'torch', 'trl', 'transformers', 'peft', 'bitsandbytes', 'rlhf_recipes.ppo.config'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_allowed_values_are_those_of_enums_and_literals_of_metadata_and_of_help_texts() -> None:
    from transformers.trainer_utils import SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    sft, dpo = schema.options("trl.SFTConfig"), schema.options("trl.DPOConfig")
    assert sft["optim"].choices == tuple(item.value for item in OptimizerNames)
    assert sft["lr_scheduler_type"].choices == tuple(item.value for item in SchedulerType)
    assert sft["save_strategy"].choices == tuple(item.value for item in SaveStrategy)
    assert sft["packing_strategy"].choices == ("bfd", "bfd_split", "wrapped")
    assert schema.options("peft.LoraConfig")["bias"].choices == ("none", "all", "lora_only")
    assert schema.options("transformers.BitsAndBytesConfig")["bnb_4bit_quant_type"].choices == ("fp4", "nf4")
    named = (
        "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
        "sigmoid_norm"
    )
    assert dpo["loss_type"].choices == tuple(named.split())


def test_no_allowed_values_are_read_out_of_help_texts_that_do_not_list_them() -> None:
    listed = {
        (path, name)
        for path in CLASSES
        for name, option in schema.options(path).items()
        if option.choices and option.owner not in ("TrainingArguments", "PeftConfig", "PeftConfigMixin")
    }
    assert listed == {
        *(("trl.SFTConfig", name) for name in ("truncation_mode", "packing_strategy", "loss_type")),
        *(("trl.DPOConfig", name) for name in ("truncation_mode", "loss_type", "f_divergence_type")),
        *(("rlhf_recipes.ppo.config.PPOConfig", name) for name in ("vllm_mode", "vllm_model_impl", "loss_type")),
        *(("rlhf_recipes.ppo.config.PPOConfig", name) for name in ("eval_strategy", "lr_scheduler_type")),  # enums
        *(("peft.LoraConfig", name) for name in ("bias", "init_lora_weights")),
        ("transformers.BitsAndBytesConfig", "bnb_4bit_quant_type"),
    }


@pytest.mark.parametrize(
    ("path", "name", "given", "taken"),
    [
        ("trl.SFTConfig", "learning_rate", 1, 1),
        ("trl.SFTConfig", "max_length", None, None),
        ("trl.SFTConfig", "eval_steps", 0.5, 0.5),
        ("trl.SFTConfig", "lr_scheduler_kwargs", {"num_cycles": 2}, {"num_cycles": 2}),
        ("trl.SFTConfig", "report_to", ["wandb", "tensorboard"], ["wandb", "tensorboard"]),
        ("trl.SFTConfig", "pad_to_multiple_of", 8, 8),
        ("trl.DPOConfig", "loss_type", "ipo", ["ipo"]),
        ("trl.DPOConfig", "loss_type", ["ipo", "sft"], ["ipo", "sft"]),
        ("peft.LoraConfig", "target_modules", "all-linear", "all-linear"),
        ("peft.LoraConfig", "target_modules", ["q_proj"], ["q_proj"]),
        ("peft.LoraConfig", "init_lora_weights", False, False),
        ("peft.LoraConfig", "init_lora_weights", "pissa_niter_4", "pissa_niter_4"),
        ("peft.LoraConfig", "eva_config", {"rho": 1.5}, {"rho": 1.5}),
        ("peft.LoraConfig", "layer_replication", [[0, 4], [2, 5]], [[0, 4], [2, 5]]),
        ("transformers.BitsAndBytesConfig", "bnb_4bit_compute_dtype", "bfloat16", "bfloat16"),
    ],
)
def test_values_of_the_right_type_are_accepted(path: str, name: str, given: Any, taken: Any) -> None:
    assert schema.options(path)[name].accept(given) == taken


@pytest.mark.parametrize(
    ("path", "name", "value", "expected"),
    [
        ("trl.SFTConfig", "learning_rate", "fast", "expected float"),
        ("trl.SFTConfig", "learning_rate", None, "expected float"),
        ("trl.SFTConfig", "max_steps", 1.5, "expected int"),
        ("trl.SFTConfig", "packing", "maybe", "expected bool"),
        ("trl.SFTConfig", "max_length", "long", "expected int | null"),
        ("trl.SFTConfig", "lr_scheduler_kwargs", 3, "expected dict | str | null"),
        ("trl.SFTConfig", "loss_type", "nlll", "expected one of nll, dft, chunked_nll"),
        ("trl.SFTConfig", "save_strategy", "step", "expected one of no, steps, epoch, best"),
        ("trl.DPOConfig", "loss_type", ["ipo", "siigmoid"], "expected one of sigmoid"),
        ("trl.DPOConfig", "loss_weights", ["a"], "expected list[float] | null"),
        ("peft.LoraConfig", "target_modules", 5, "expected "),
        ("peft.LoraConfig", "init_lora_weights", "pisa", "expected one of gaussian"),
        ("peft.LoraConfig", "eva_config", 2, "expected dict | null"),
        ("peft.LoraConfig", "layer_replication", [[0, 4, 5]], "expected list[tuple[int, int]] | null"),
        ("transformers.BitsAndBytesConfig", "load_in_4bit", "nf4", "expected bool"),
        ("transformers.BitsAndBytesConfig", "bnb_4bit_quant_type", "nf5", "expected one of fp4, nf4"),
    ],
)
def test_values_of_another_type_are_refused_with_what_is_allowed(
    path: str, name: str, value: Any, expected: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        schema.options(path)[name].accept(value)
    assert str(refusal.value).startswith(expected)


def test_a_node_is_typed_and_holds_only_what_was_set() -> None:
    node = schema.node(schema.options("trl.SFTConfig"), {"learning_rate": 1, "loss_type": "dft"}, defaults=False)
    assert OmegaConf.to_container(node) == {"learning_rate": 1.0, "loss_type": "dft"}
    assert isinstance(node.learning_rate, float)
    with pytest.raises(Exception, match="not in"):
        _ = node.learnin_rate


def test_a_node_with_defaults_holds_them_all() -> None:
    node = schema.node(sections("sft")["model"], {"name_or_path": "here"}, defaults=True)
    assert node.dtype == "auto"
    assert node.trust_remote_code is False
    assert node.name_or_path == "here"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small library with a lazy top, a base in another module, and a class whose fields are arguments."""
    folder = tmp_path / "lazylib" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "lazylib" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nraise ImportError('must not be imported')\n"
        "if TYPE_CHECKING:\n    from .deep import Renamed as Config\n    from .deep.plain import Plain\n"
    )
    (folder / "__init__.py").write_text("from .child import Child as Renamed\n")
    (folder / "child.py").write_text(
        "from dataclasses import dataclass, field\nfrom ..base import Base, Level\n\n"
        "@dataclass\nclass Child(Base):\n"
        "    rate: float = field(default=2e-3, metadata={'help': 'Child, ' 'in 100%% of cases.'})\n"
        "    level: Level | str = Level.LOW\n"
        "    names: list[str] = field(default_factory=lambda: ['a'], metadata={'help': 'Names.'})\n"
    )
    (tmp_path / "lazylib" / "base.py").write_text(
        "import enum\nfrom dataclasses import dataclass\n\n"
        "class Level(enum.Enum):\n    LOW = 'low'\n    HIGH = 'high'\n\n"
        "@dataclass\nclass Base:\n    rate: float = 1.0\n    steps: int | None = None\n"
    )
    (folder / "plain.py").write_text(
        "class Plain:\n    '''Plain.\n\n    Args:\n        flag (`bool`, *optional*):\n            Two\n"
        "            lines.\n    '''\n"
        "    def __init__(self, flag=False, kind=None, share: float = 0.5, **kwargs):\n        pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "lazylib"


def test_classes_are_found_through_lazy_packages_and_renaming_imports(package: str) -> None:
    options = schema.options(f"{package}.Config")
    assert list(options) == ["rate", "steps", "level", "names"]
    assert (options["rate"].value, options["rate"].owner) == (0.002, "Child")
    assert options["rate"].help == "Child, in 100% of cases."
    assert options["level"].choices == ("low", "high")
    assert options["names"].value == MISSING
    assert options["steps"].annotation == "int | null"


def test_arguments_of_a_plain_class_take_types_from_defaults_and_help_from_the_docstring(package: str) -> None:
    options = schema.options(f"{package}.Plain")
    assert {name: option.annotation for name, option in options.items()} == {
        "flag": "bool",
        "kind": "anything",
        "share": "float",
    }
    assert options["flag"].help == "Two lines."


def test_a_class_that_is_not_there_is_named(package: str) -> None:
    with pytest.raises(LookupError, match="no class Missing in the source of lazylib"):
        schema.options(f"{package}.Missing")
    with pytest.raises(ModuleNotFoundError, match="make setup"):
        schema.options("no_such_library.Config")
