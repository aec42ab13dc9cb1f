"""From the command line to a config class: composing, refusing, building, and the command around a recipe."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from rlhf_recipes import config
from rlhf_recipes.config import build, compose, plain, recipe
from rlhf_recipes.config.options import DECIDED, RECIPES, TRAINING, options
from rlhf_recipes.errors import UserError

ARGS = ["run=first", "model=qwen2.5-0.5b", "data=ultrafeedback", "hardware=12gb", "lora.r=32", "start=model", "trunk=0"]


def faults(name: str, *overrides: str) -> list[str]:
    """The lines of a refusal between its head and its foot."""
    with pytest.raises(UserError) as refusal:
        compose(name, overrides)
    return [line.strip() for line in str(refusal.value).splitlines()[1:-1]]


# Composing


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_overrides_are_accepted_by_every_recipe(name: str) -> None:
    cfg = compose(name, ARGS)
    assert (cfg.run, cfg.start, cfg.trunk) == ("first", "model", 0.0)
    assert cfg.model.name_or_path == "Qwen/Qwen2.5-0.5B"
    assert cfg.lora.r == 32
    assert cfg.quantization.load_in_4bit is True
    assert cfg.data.preferences.path == "HuggingFaceH4/ultrafeedback_binarized"


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_the_library_is_an_override_without_a_plus(name: str) -> None:
    settable = [key for key, option in options(name).items() if key not in DECIDED and option.annotation == "bool"]
    settable = [key for key in settable if not key.startswith(("quantization.", "guard.")) and key != "training.fp16"]
    assert len(settable) >= 40, "the listing finds them"
    cfg = compose(name, [f"{key}=true" for key in settable])
    assert all(OmegaConf.select(cfg, key) is True for key in settable)


def test_a_config_holds_what_was_set_and_no_default_of_a_library() -> None:
    cfg = compose("sft", ["model=smollm2-135m", "training.packing=true"])
    assert cfg.training.packing is True
    assert "neftune_noise_alpha" not in cfg.training
    assert plain(cfg.quantization) == {}
    assert cfg.model.dtype == "auto", "the project's own options are all there"


def test_the_last_word_on_a_key_counts() -> None:
    assert compose("sft", ["evaluation.samples=1", "evaluation.samples=2"]).evaluation.samples == 2
    assert compose("sft", [f"evaluation.samples={n}" for n in (1, 2, 1)]).evaluation.samples == 1


def test_values_are_typed() -> None:
    cfg = compose("dpo", ["training.learning_rate=1", "run=5", "training.loss_type=ipo", "model.revision=12"])
    assert [type(cfg.training.learning_rate), cfg.run] == [float, "5"]
    assert cfg.training.loss_type == ["ipo"]
    assert cfg.model.revision == "12"


def test_keys_below_a_mapping_are_free() -> None:
    cfg = compose("sft", ["training.lr_scheduler_kwargs.num_cycles=2", "lora.rank_pattern.q_proj=8"])
    assert cfg.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert cfg.lora.rank_pattern == {"q_proj": 8}


def test_a_mixture_takes_the_place_of_a_source() -> None:
    mixture = [{"path": "world", "weight": 2}, {"path": "mine.jsonl", "weight": 1}]
    cfg = compose("sft", ["data.sft=[{path: world, weight: 2}, {path: mine.jsonl, weight: 1}]"])
    assert OmegaConf.to_container(cfg.data.sft) == mixture


def test_a_recipe_that_mistypes_a_key_of_its_config_fails() -> None:
    cfg = compose("sft")
    with pytest.raises(Exception, match="modle"):
        _ = cfg.modle


def test_the_embedded_model_brings_its_own_training_values_and_another_model_does_not() -> None:
    assert compose("ppo").training.beta == 0.25
    assert "beta" not in compose("ppo", ["model=qwen2.5-0.5b"]).training
    assert compose("ppo", ["model=qwen2.5-7b", "hardware=8gb"]).training.per_device_train_batch_size == 2
    assert compose("ppo", ["training.beta=0.1"]).training.beta == 0.1


def test_the_command_line_wins_over_hardware_and_experiment() -> None:
    assert plain(compose("sft", ["hardware=12gb", "quantization=none"]).quantization) == {}
    cfg = compose("sft", ["experiment=smoke", "training.max_steps=7"])
    assert (cfg.training.max_steps, cfg.run) == (7, "smoke")


# Refusing


def test_all_faults_come_in_one_message_each_with_the_nearest_name() -> None:
    told = faults(
        "ppo",
        "model=qwen2.5-0.5",
        "training.learnin_rate=1e-5",
        "learning_rate=1e-5",
        "training.max_steps=many",
        "training.eval_strategy=step",
        "lora.rank=8",
        "hardwar=8gb",
        "data.prompts.max_row=5",
        "training.top_p=0.9,1.0",
        "--seed",
        "quick",
    )
    expected = {
        "model=qwen2.5-0.5: no such choice; did you mean model=qwen2.5-0.5b?",
        "training.learnin_rate=1e-05: no such option; did you mean training.learning_rate?",
        "learning_rate=1e-05: no such option; did you mean training.learning_rate?",
        "training.max_steps=many: expected int",
        "training.eval_strategy=step: expected one of no, steps, epoch",
        "lora.rank=8: no such option; did you mean lora.r?",
        "hardwar=8gb: no such option; did you mean hardware?",
        "data.prompts.max_row is unknown (did you mean `max_rows`?)",
        "training.top_p=0.9,1.0: more than one value; add -m",
        "--seed: no such flag; options have no dashes",
        "quick: not of the form key=value",
    }
    assert len(told) == len(expected)
    assert {fault for fault in expected if any(line.startswith(fault) for line in told)} == expected


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize("section", ["quantization.bnb_4bit_quant_typ=nf4", "training.packin=true", "model.dtpye=auto"])
def test_unknown_keys_are_refused_with_and_without_plus(prefix: str, section: str) -> None:
    key = section.partition("=")[0]
    assert any(line.startswith(f"{key}=") and "did you mean" in line for line in faults("sft", prefix + section))


def test_an_option_of_another_recipe_is_named_as_such() -> None:
    assert faults("sft", "training.beta=0.1") == [
        "training.beta=0.1: an option of dpo and ppo, not of sft: give it in DPO_ARGS, PPO_ARGS, not in ARGS"
    ]
    assert "give it in PPO_ARGS" in faults("rm", "reward.url=http://localhost")[0]


def test_a_token_is_refused_without_being_repeated() -> None:
    told = faults("sft", "training.hub_token=hf_secret")
    assert "HF_TOKEN" in told[0]
    assert "hf_secret" not in told[0]


@pytest.mark.parametrize("key", DECIDED)
def test_what_a_recipe_sets_itself_is_refused_with_what_to_use_instead(key: str) -> None:
    names = [name for name in TRAINING if key in options(name)]
    assert names, f"{key} is an option no more"
    assert f"{key}: not to be set; {DECIDED[key]}" in faults(names[-1], f"{key}=1")


def test_a_section_a_missing_value_and_a_bad_interpolation_are_told() -> None:
    assert faults("sft", "training=5") == ["training=5: a section; set its options, as training.<option>=<value>"]
    assert faults("sft", "~run") == ["run: no value; set run=<str>"]
    assert "not_there" in faults("sft", "run=${not_there}")[0]


def test_folders_and_hub_ids_given_as_a_preset_are_pointed_to_their_key() -> None:
    assert "model.name_or_path=" in faults("sft", "model=meta-llama/Llama-3.2-1B")[0]
    assert "data.sft.path=" in faults("sft", "data=my/file.jsonl")[0]


def test_data_of_later_stages_are_checked_by_the_first_one() -> None:
    assert faults("sft", "data.prompts=mine.jsonl")[0].startswith("data.prompts is the text")
    assert faults("sft", "data.prompts.mapping=nothing")[0].startswith("data.prompts.mapping=nothing is unknown")


# Building


def test_build_passes_on_only_what_was_set() -> None:
    from trl import SFTConfig

    cfg = compose("sft", ["training.packing=true", "model=qwen2.5-0.5b"])
    args = build(SFTConfig, cfg.training, use_cpu=True, output_dir="here")
    expected = SFTConfig(use_cpu=True, output_dir="here", **plain(cfg.training))
    assert (args.packing, args.output_dir, args.learning_rate) == (True, "here", 2e-4)
    assert args.to_dict() == expected.to_dict()


def test_what_a_recipe_gives_to_build_is_a_default_only() -> None:
    from peft import LoraConfig

    assert build(LoraConfig, compose("sft", ["lora.r=4"]).lora, r=8, lora_bias=True).r == 4


def test_a_lora_config_with_lists_can_be_saved(tmp_path: Path) -> None:
    from peft import LoraConfig

    build(LoraConfig, compose("sft", ["lora.target_modules=[q_proj,v_proj]"]).lora).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]


def test_the_nf4_preset_is_nf4_with_double_quantization() -> None:
    from transformers import BitsAndBytesConfig

    built = build(BitsAndBytesConfig, compose("sft", ["quantization=nf4"]).quantization)
    assert (built.load_in_4bit, built.bnb_4bit_quant_type, built.bnb_4bit_use_double_quant) == (True, "nf4", True)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("sft", ["training.num_train_epochs=3"], "max_steps=90 decides .*; add training.max_steps=-1"),
        ("ppo", ["training.num_train_epochs=3"], "max_steps=168 decides"),
        ("dpo", ["model=qwen2.5-0.5b", "training.num_train_epochs=3", "training.max_steps=5"], "max_steps=5 decides"),
        ("rm", ["start=model", "lora.modules_to_save=[lm_head]"], "lora.modules_to_save: no effect in a reward model"),
        ("sft", ["training.save_only_model=true"], "save_only_model: .* cannot resume without optimizer"),
    ],
)
def test_options_that_would_do_nothing_or_spoil_a_resume_are_refused_before_anything_is_loaded(
    name: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compose(name, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.num_train_epochs=3", "training.max_steps=-1"],
        ["model=qwen2.5-0.5b", "training.num_train_epochs=3"],
    ],
)
def test_options_that_have_an_effect_are_accepted(overrides: list[str]) -> None:
    compose("sft", overrides)


def test_build_refuses_options_that_the_class_would_ignore_in_silence() -> None:
    from transformers import BitsAndBytesConfig

    with pytest.raises(UserError, match="BitsAndBytesConfig has no option bnb_4bit_quant_typ"):
        build(BitsAndBytesConfig, OmegaConf.create({"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}))


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("ppo", "training.num_generations=3", "num_generations"),
        ("sft", "training.load_best_model_at_end=true", "load_best_model_at_end"),
    ],
)
def test_what_the_class_refuses_is_a_user_error(name: str, override: str, message: str) -> None:
    from trl import SFTConfig

    from rlhf_recipes.ppo.config import PPOConfig

    classes: dict[str, Any] = {"sft": SFTConfig, "ppo": PPOConfig}
    with pytest.raises(UserError, match=f"(?s)Config refuses its options: .*{message}"):
        build(classes[name], compose(name, [override]).training, use_cpu=True)


# The command


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[DictConfig]]:
    """Calls a recipe with a command line in an empty folder, and gives back the configs that it got."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *argv: str) -> list[DictConfig]:
        got: list[DictConfig] = []

        @recipe(name)
        def main(cfg: DictConfig) -> None:
            got.append(cfg)
            if cfg.seed == 13:
                raise UserError("13 is unlucky; use another seed=")

        monkeypatch.setattr(sys, "argv", ["recipes.test", *argv])
        main()
        return got

    return call


def test_a_recipe_gets_the_config_of_its_command_line_and_hydra_leaves_no_trace(
    call: Callable[..., list[DictConfig]], tmp_path: Path
) -> None:
    (cfg,) = call("ppo", "run=mine", "training.beta=0.2", "model.revision=main")
    assert (cfg.run, cfg.training.beta, cfg.model.revision) == ("mine", 0.2, "main")
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_flags_and_overrides_may_stand_in_any_order(call: Callable[..., list[DictConfig]]) -> None:
    configs = call("ppo", "run=mine", "-m", "training.beta=0.1,0.2", "seed=1,2")
    assert [(cfg.training.beta, cfg.seed) for cfg in configs] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]


def test_a_sweep_over_group_choices_writes_only_its_overrides(
    call: Callable[..., list[DictConfig]], tmp_path: Path
) -> None:
    configs = call("sft", "-m", "run=mine", "model=embedded,smollm2-135m")
    assert [cfg.model.name_or_path.startswith("Hugging") for cfg in configs] == [False, True]
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["runs/mine/multirun.yaml"]


def test_a_fault_in_any_job_of_a_sweep_stops_it_before_the_first(
    call: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call("sft", "-m", "training.max_steps=3,many", "model=embedded,nothing")
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "training.max_steps=many: expected int" in told
    assert "model=nothing: no such choice" in told


def test_a_user_error_of_a_recipe_is_a_plain_message_and_exit_code_2(
    call: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call("sft", "seed=13")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "13 is unlucky; use another seed=\n")


def test_cfg_job_prints_only_what_is_set(
    call: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("ppo", "--cfg", "job", "training.gamma=0.9") == []
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.training.gamma == 0.9
    assert "lam" not in printed.training
    assert "hydra" not in printed


def test_cfg_job_refuses_a_typo_too(call: Callable[..., list[DictConfig]]) -> None:
    with pytest.raises(SystemExit) as stop:
        call("ppo", "--cfg", "job", "training.gama=0.9")
    assert stop.value.code == 2


def test_help_shows_groups_choices_and_the_values_of_this_command_line(
    call: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    call("ppo", "--help", "training.beta=0.125", "model=qwen2.5-0.5b")
    told = capsys.readouterr().out
    assert "quantization  int8, nf4, none" in told
    assert "training.beta = 0.125\n      Coefficient of the KL penalty" in told
    assert "model.name_or_path = Qwen/Qwen2.5-0.5B" in told
    assert "--options [word]" in told
    assert "training.dataloader_num_workers" not in told


def test_options_finds_options_by_a_word_of_their_name_or_help(
    call: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    call("sft", "--options", "NEFTune")
    told = capsys.readouterr().out
    assert told.startswith("training.neftune_noise_alpha: float | null = null\n    ")
    call("sft", "--options")
    everything = capsys.readouterr().out
    assert all(f"\n{key}: " in f"\n{everything}" for key in options("sft"))
    assert "Not to be set: it would be written into the run's folder" in everything


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--cfg", "job"], 0),
        (["--options", "kl"], 0),
        (["training.learnin_rate=1"], 2),
        (["lora.r=0", "training.report_to=nonsense"], 2),
    ],
)
def test_help_configs_and_refusals_take_less_than_two_seconds_and_no_torch(
    argv: list[str], code: int, tmp_path: Path
) -> None:
    (tmp_path / "stage.py").write_text(
        "import atexit, sys\nfrom rlhf_recipes.config import recipe\n"
        "atexit.register(lambda: sys.stderr.write('torch!') if {'torch', 'trl', 'peft'} & {*sys.modules} else None)\n"
        "@recipe('ppo')\ndef main(cfg):\n    pass\n\nmain()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(config.CONF.parent)}
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "stage.py", *argv], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime  # of work, on a busy machine too
    assert done.returncode == code, done.stderr
    assert "torch!" not in done.stderr
    assert seconds < 2


@pytest.mark.parametrize("recipe", ["sft", "rm", "dpo", "ppo"])
def test_another_model_by_its_name_gets_none_of_the_embedded_ones_settings(recipe: str) -> None:
    named = compose(recipe, ["model.name_or_path=org/model"])
    assert named.model.name_or_path == "org/model"
    preset = compose(recipe, ["model=smollm2-135m"])
    assert dict(named.training) == dict(preset.training) != dict(compose(recipe).training)
    assert named.evaluation == preset.evaluation
    assert compose(recipe, ["model.name_or_path=embedded"]) == compose(recipe)
    kept = compose(recipe, ["model=qwen2.5-0.5b", "model.name_or_path=org/model"])
    assert kept.model.eos_token == "<|im_end|>"


def test_the_folder_of_a_sweep_needs_no_quotes_alone_and_in_a_list():
    assert compose("ppo", ["reward.model=runs/a/rm/seed=1"]).reward.model == "runs/a/rm/seed=1"
    model = compose("ppo", ["reward.model=[run,runs/a/rm/seed=1,'b c']"]).reward.model
    assert list(model) == ["run", "runs/a/rm/seed=1", "b c"]
