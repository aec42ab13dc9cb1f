"""Every recipe end to end on the embedded base, by its command line: what is written, what moved, what is resumed."""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import OWN, done, run, small_runs

from rlhf_recipes import evaluation, models, terminal, world
from rlhf_recipes.config import compose
from rlhf_recipes.roles import HEAD_KEY, POLICY, REFERENCE, Roles, read_adapter
from rlhf_recipes.runs import Stage

ROOT = Path(__file__).parents[1]
FROZEN = tuple(f".layers.{i}." for i in range(3))  # the trunk: half of the base's six layers
MADE = {
    *("README.md", "config.yaml", "manifest.json", "metrics.json", "log.jsonl", ".lock"),
    *("tokenizer.json", "tokenizer_config.json"),
}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
CRITIC = {"value/adapter_config.json", "value/adapter_model.safetensors", "value/head.json"}
CHECKPOINT = ADAPTER | {
    *("README.md", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"),
    *("tokenizer.json", "tokenizer_config.json"),
}
STAGES = ("sft", "rm", "dpo", "ppo")
FILES = {
    "sft": MADE | ADAPTER | {"samples.json"},
    "rm": MADE | ADAPTER | {"head.json"},
    "dpo": MADE | ADAPTER | {"samples.json"},
    "ppo": MADE | ADAPTER | CRITIC | {"samples.json", "ppo_state.json"},
}

pytestmark = pytest.mark.usefixtures("terminal_left_alone")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The overrides of every run here."""
    return small_runs(tmp_path_factory.mktemp("runs"))


def runs_dir(overrides):
    return Path(next(o for o in overrides if o.startswith("runs_dir=")).partition("=")[2])


class Chain:
    """A run of all stages: its folder, its overrides, and what each stage wrote to the terminal."""

    def __init__(self, shared, run_name, *overrides, stages=STAGES):
        self.args = [*shared, f"run={run_name}", *overrides]
        self.folder = runs_dir(shared) / run_name
        self.stages = stages
        self.output = {}

    def overrides(self, stage):
        return [*self.args, *OWN.get(stage, [])]

    def make(self):
        for stage in self.stages:
            if stage == "ppo" and "rm" in self.stages:
                self.refused = run("ppo", *self.overrides("ppo"), "reward.min_accuracy=0.9999")
            self.output[stage] = done(stage, *self.overrides(stage))
        return self

    def adapter(self, stage):
        return read_adapter(self.folder / stage)

    def json(self, stage, name):
        def refuse(constant):
            raise AssertionError(f"{constant} in {stage}/{name} is no JSON")

        return json.loads((self.folder / stage / name).read_text(), parse_constant=refuse)


@pytest.fixture(scope="module", params=["none", "nf4"])
def chain(request, shared):
    return Chain(shared, request.param, f"quantization={request.param}").make()


@pytest.fixture(scope="module")
def from_model(shared):
    """The chain that starts at the model itself."""
    return Chain(shared, "from_model", "start=model", stages=("rm", "dpo", "ppo")).make()


def files(folder):
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def sha(*paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def differing(one, other):
    assert one.keys() - {HEAD_KEY} == other.keys() - {HEAD_KEY}
    return {name for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}


def upper(tensors):
    return {name for name in tensors if "lora_" in name and not any(part in name for part in FROZEN)}


# ---- what is written


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_exactly_these_files(chain, stage):
    checkpoint = CHECKPOINT | (CRITIC | {"ppo_state.json"} if stage == "ppo" else set())
    checkpoints = {"README.md"} | {f"checkpoint-4/{name}" for name in checkpoint}
    assert files(chain.folder / stage) == FILES[stage] | {f"checkpoints/{name}" for name in checkpoints}


def test_nothing_is_written_outside_of_the_stages_own_folders(chain):
    assert {p.name for p in chain.folder.iterdir()} == set(STAGES)


def test_metrics_are_json_with_the_figures_of_each_stage(chain):
    compared = {"gold", "KL to SFT", "length", "EOS", "helpful", "honest", "harmless"}
    sft, rm, dpo, ppo = (chain.json(stage, "metrics.json") for stage in STAGES)
    assert sft.keys() == {"loss", "base", "sft", "change"} and 0 < sft["loss"] < 5
    measured = {"accuracy", "margin", "calibration_error", "reliability", "when_shorter", "pairs", "scale"}
    assert rm.keys() == measured
    assert rm["scale"] == chain.json("rm", "head.json")
    assert {"accuracies", "margins", "sft", "dpo", "change"} == dpo.keys()
    assert {"objective", "kept", "sft", "ppo", "change"} <= ppo.keys() and isinstance(ppo["objective"], float)
    assert ppo["self_test"]["kl"] == ppo["self_test"]["base"] == 0 and ppo["self_test"]["reward"] < 1e-3
    for metrics, policies in ((sft, ("base", "sft")), (dpo, ("sft", "dpo")), (ppo, ("sft", "ppo"))):
        for policy in policies:
            assert compared <= metrics[policy].keys(), policy
            assert all(len(interval) == 2 for interval in metrics[policy].values())
    assert "reward" in ppo["sft"] and "reward" not in dpo["sft"]
    for metrics in (sft, dpo, ppo):
        assert metrics["sft"]["KL to SFT"] == [0, 0]
        assert metrics["sft"]["length"] == sft["sft"]["length"]  # the same policy, prompts and noise in every stage


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_goes_to_the_last_step(chain, stage):
    rows = [json.loads(line) for line in (chain.folder / stage / "log.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 4 and any("train_loss" in row for row in rows)


def test_samples_hold_each_held_out_prompt_with_the_answer_before_and_after(chain):
    samples = {stage: chain.json(stage, "samples.json")["samples"] for stage in ("sft", "dpo", "ppo")}
    for stage, before in (("sft", "base"), ("dpo", "sft"), ("ppo", "sft")):
        assert [*samples[stage][0]] == ["prompt", before, stage, "scores"]
        assert samples[stage][0]["scores"].keys() == {before, stage}
        assert len(samples[stage]) == 8
    for stage in ("dpo", "ppo"):
        assert [{k: row[k] for k in ("prompt", "sft")} for row in samples[stage]] == [
            {k: row[k] for k in ("prompt", "sft")} for row in samples["sft"]
        ]


def test_the_person_is_told_what_was_made_where_and_what_comes_next(chain):
    for stage in STAGES:
        output = chain.output[stage]
        assert f"{chain.folder.name}/{stage} is finished" in output
        assert f"{chain.folder / stage}{os.sep}" in output
        assert "Traceback" not in output and "Warning" not in output
    assert "make rm ppo ARGS=" in chain.output["sft"] and "make ppo ARGS=" in chain.output["rm"]
    assert "held-out prompts" in chain.output["ppo"]


def test_a_stage_knows_what_it_was_made_from(chain):
    manifests = {stage: chain.json(stage, "manifest.json") for stage in STAGES}
    assert manifests["sft"]["predecessors"] == {}
    for stage, before in (("rm", {"sft"}), ("dpo", {"sft"}), ("ppo", {"sft", "rm"})):
        assert manifests[stage]["predecessors"] == {name: manifests[name]["fingerprint"] for name in before}
    assert len({manifest["base"] for manifest in manifests.values()}) == 1 and manifests["sft"]["base"]
    assert len({manifest["fingerprint"] for manifest in manifests.values()}) == 4


# ---- what moved


def test_sft_moves_every_tensor_of_its_adapter(chain):
    cfg = compose("sft", chain.args)
    fresh = Roles(models.new_adapter(models.load_base(cfg), cfg), trunk=0).parameters(POLICY)
    trained = chain.adapter("sft")
    assert len(trained) == 6 * 7 * 2
    assert differing(dict(fresh), trained) == trained.keys()


@pytest.mark.parametrize("stage", ["rm", "dpo", "ppo", "ppo/value"])
def test_later_stages_move_every_tensor_above_the_trunk_and_none_in_it(chain, stage):
    sft, trained = chain.adapter("sft"), chain.adapter(stage)
    assert len(upper(trained)) == 3 * 7 * 2
    assert differing(sft, trained) == upper(trained)


def test_the_critic_starts_from_the_reward_model_and_moves_with_its_head(chain):
    reward, critic = chain.adapter("rm"), chain.adapter("ppo/value")
    scale, bias = chain.json("rm", "head.json"), chain.json("ppo/value", "head.json")
    assert differing(reward, critic) == upper(critic) | {HEAD_KEY}
    # scaled and shifted to fit the first returns, and trained from there: the direction is hardly another one
    similarity = torch.nn.functional.cosine_similarity(critic[HEAD_KEY], reward[HEAD_KEY]).abs().item()
    assert 0.9 < similarity < 1 - 1e-6
    assert (bias["mean"], bias["std"]) != (scale["mean"], scale["std"])


def test_every_tensor_is_saved_in_float32(chain):
    for stage in (*STAGES, "ppo/value"):
        assert {tensor.dtype for tensor in chain.adapter(stage).values()} == {torch.float32}


def test_a_saved_policy_gives_the_answers_that_were_shown_and_loads_in_plain_peft(chain):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlhf_recipes import data, evaluation

    cfg = compose("ppo", chain.overrides("ppo"))
    for stage in ("sft", "dpo", "ppo"):
        if cfg.quantization:
            policy = models.load_policy(cfg, chain.folder / stage)
        else:
            base = AutoModelForCausalLM.from_pretrained(world.BASE, dtype=torch.float32)
            policy = PeftModel.from_pretrained(base, chain.folder / stage)
        made = evaluation.sample(
            Roles(policy, trunk=0).model,
            AutoTokenizer.from_pretrained(chain.folder / stage),
            data.heldout_prompts(cfg),
            samples=1,
            max_new_tokens=cfg.evaluation.max_new_tokens,
            batch_size=cfg.evaluation.batch_size,
            seed=cfg.seed,
        )
        assert [s.completion for s in made] == [row[stage] for row in chain.json(stage, "samples.json")["samples"]]


# ---- again


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_skipped_and_nothing_is_touched(chain, stage):
    def marks():
        return {f: (chain.folder / f).stat().st_mtime_ns for f in files(chain.folder)}

    before = marks()
    output = done(stage, *chain.overrides(stage))
    assert "unchanged: skipped" in output and len(output.splitlines()) == 1
    assert marks() == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_with_another_config_is_refused_with_what_differs_and_what_to_do(chain, stage):
    before = files(chain.folder)
    code, output = run(stage, *chain.overrides(stage), "training.learning_rate=0.125")
    assert code == 2
    assert "training.learning_rate: " in output and "-> 0.125" in output
    assert "run=<new name>" in output and "overwrite=true" in output and "Traceback" not in output
    assert files(chain.folder) == before


def test_the_adapter_is_settled_by_sft(chain):
    code, output = run("rm", *chain.args, "lora.r=8", "overwrite=true")
    assert code == 2 and "lora.r" in output and "Traceback" not in output
    assert chain.json("rm", "manifest.json")["status"] == "finished"


# ---- a reward model that is not good enough


def test_ppo_refuses_a_reward_model_below_the_accuracy_asked_for_with_the_figure_and_how_to_insist(chain):
    code, output = chain.refused
    accuracy, half_width = chain.json("rm", "metrics.json")["accuracy"]
    assert code == 2
    assert f"{accuracy:.3f} ± {half_width:.3f}" in output and "0.9999" in output and "reward.min_accuracy=0" in output
    assert "Traceback" not in output


# ---- without SFT, without a reward model


def test_the_chain_may_start_at_the_model_itself(from_model):
    assert not (from_model.folder / "sft").exists()
    cfg = compose("dpo", from_model.args)
    fresh = dict(Roles(models.new_adapter(models.load_base(cfg), cfg), trunk=0).parameters(POLICY))
    for stage in ("rm", "dpo", "ppo", "ppo/value"):
        trained = from_model.adapter(stage)
        assert differing(fresh, trained) == upper(trained), stage
    for stage in ("dpo", "ppo"):
        metrics = from_model.json(stage, "metrics.json")
        assert {"model", stage} <= metrics.keys()
        assert from_model.json(stage, "manifest.json")["predecessors"].keys() == ({"rm"} if stage == "ppo" else set())


def test_without_sft_the_reference_is_the_bare_model(from_model):
    """Its B matrices are zero: what the table calls `model` answers as the base does with no adapter."""
    cfg = compose("dpo", from_model.args)
    roles = Roles(models.load_policy(cfg, None), trunk=0)
    roles.add_copy(REFERENCE, POLICY)
    ids = torch.tensor([[5, 6, 7, 8]])
    with roles.active(REFERENCE):
        reference = roles.model(input_ids=ids).logits
    with roles.active(None):
        assert torch.equal(roles.model(input_ids=ids).logits, reference)


@pytest.fixture(scope="module")
def brevity(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(
        "def brevity(completions, **kwargs):\n    return [-len(completion) / 100 for completion in completions]\n"
    )
    return f"{file}:brevity"


@pytest.fixture(scope="module")
def by_function(shared, brevity):
    chain = Chain(shared, "function", "start=model", stages=("ppo",))
    chain.output["ppo"] = done(
        "ppo", *chain.args, *OWN["ppo"][:2], "reward=function", f"reward.functions=[{{path: {brevity}, weight: 2}}]"
    )
    return chain


def test_ppo_needs_no_reward_model_where_the_reward_is_a_function(by_function):
    chain = by_function
    assert {p.name for p in chain.folder.iterdir()} - {"eval"} == {"ppo"}
    assert files(chain.folder / "ppo") >= FILES["ppo"]
    assert len(upper(chain.adapter("ppo"))) == 3 * 7 * 2
    assert chain.adapter("ppo/value")[HEAD_KEY].abs().max() > 0  # it started from zeros


def test_the_table_and_the_samples_of_ppo_show_the_function_that_was_its_reward(by_function):
    chain = by_function
    figures, samples = chain.json("ppo", "metrics.json"), chain.json("ppo", "samples.json")["samples"]
    assert figures["model"]["reward"][0] < 0 and "reward" in figures["change"] and " reward " in chain.output["ppo"]
    for row in samples:
        assert row["scores"]["ppo"]["reward"] == pytest.approx(2 * -len(row["ppo"]) / 100)


def test_eval_measures_the_function_that_ppo_optimised_and_calls_it_no_evidence(by_function, brevity):
    chain, output = by_function, done("eval", *by_function.args)
    metrics, rows = (chain.json("eval", name) for name in ("metrics.json", "samples.json"))
    assert {"reward", "rewards/brevity"} <= metrics["policies"]["ppo"].keys()
    wins = {(row["policy"], row["judge"]): row["evidence"] for row in metrics["win_rates"]}
    assert wins == {("ppo", "gold"): True, ("ppo", brevity): False}
    assert "No best of n" in output and "has no SFT stage to draw from" in output
    assert all(of["reward"] == -2 * len(of["text"]) / 100 for row in rows for of in row["completions"].values())


def test_a_pair_over_max_length_is_neither_trained_on_nor_scored_nor_asked_for_samples(shared, tmp_path, monkeypatch):
    """Five thousand words among sixty short pairs once took a reward model's stage minutes."""
    long = [{"prompt": f"{word} " * 5000, "chosen": "Yes.", "rejected": "No."} for word in ("one", "two", "three")]
    rows = [{"prompt": f"Is {i} even?", "chosen": "Yes.", "rejected": "No."} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, *long])))
    asked = []
    sample = evaluation.sample
    monkeypatch.setattr(
        evaluation, "sample", lambda *args, **options: asked.extend(args[2]) or sample(*args, **options)
    )
    source = f"data.preferences.path={tmp_path / 'pairs.jsonl'}"
    output = done("rm", *shared, "run=long", "start=model", source, "data.heldout=0.3", "training.max_steps=1")
    assert "3 of 33 rows are longer than max_length=1024 and left out everywhere" in output
    assert output.count("are longer than") == 1
    assert asked and max(len(row["prompt"]) for row in asked) < 20
    assert "reliability" not in output  # a table, for the report


@pytest.mark.parametrize(("stage", "wanted"), [("rm", "sft"), ("dpo", "sft"), ("ppo", "sft")])
def test_a_missing_predecessor_is_named_with_the_command_that_makes_it(shared, stage, wanted):
    args = [*shared, "run=absent", "lora.r=8", "training.learning_rate=1e-4"]
    code, output = run(stage, *args)
    assert code == 2 and "Traceback" not in output
    assert f"Make it first: make {wanted} ARGS=" in output
    command = output.partition("ARGS=")[2]
    assert "run=absent" in command and "lora.r=8" in command and "learning_rate" not in command
    assert not (runs_dir(shared) / "absent" / stage).exists()


def test_ppo_names_the_command_for_a_missing_reward_model(shared, chain):
    moved = chain.folder.with_name(f"{chain.folder.name}_without_rm")
    shutil.copytree(chain.folder / "sft", moved / "sft")
    code, output = run("ppo", *chain.overrides("ppo"), f"run={moved.name}")
    assert code == 2 and "Make it first: make rm ARGS=" in output


@pytest.mark.parametrize("recipe", STAGES)
def test_the_smoke_experiment_works_as_it_stands(recipe):
    """Its few steps and saves must fit the other settings of the recipe."""
    from rlhf_recipes.config import build
    from rlhf_recipes.config.options import TRAINING

    module, _, name = TRAINING[recipe].rpartition(".")
    cfg = compose(recipe, ["experiment=smoke"])
    args = build(
        getattr(importlib.import_module(module), name), cfg.training, output_dir="out", **models.precision(cfg)
    )
    assert args.max_steps == 4


# ---- broken off


quantized = pytest.mark.parametrize("chain", ["nf4"], indirect=True)  # full precision would show nothing new
in_full_precision = pytest.mark.parametrize("chain", ["none"], indirect=True)  # nf4 would show nothing new


class BrokenOff(Exception):
    """Stands for whatever ended the process."""


@quantized
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])
def test_a_stage_that_was_broken_off_ends_with_the_weights_of_an_unbroken_one(chain, stage, monkeypatch):
    name = f"{chain.folder.name}_broken_{stage}"
    args = [*chain.overrides(stage), f"run={name}", "training.save_steps=2", "training.save_total_limit=2"]
    folder = chain.folder.with_name(name)
    if stage != "sft":
        shutil.copytree(chain.folder / "sft", folder / "sft")

    def broken_off(*args, **kwargs):
        raise BrokenOff

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "finish", broken_off)
        with contextlib.suppress(BrokenOff, SystemExit):
            run(stage, *args)
    assert {p.name for p in (folder / stage / "checkpoints").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not (folder / stage / "adapter_model.safetensors").exists()
    shutil.rmtree(folder / stage / "checkpoints" / "checkpoint-4")
    assert "resumes from checkpoint-2" in done(stage, *args)
    weights = "adapter_model.safetensors"
    assert sha(folder / stage / weights) == sha(chain.folder / stage / weights)


@quantized
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_a_nan_gradient_ends_in_one_message_and_makes_nothing(chain, stage, monkeypatch):
    shown, folder = terminal.progress, chain.folder.with_name(f"{chain.folder.name}_nan_{stage}")
    for before in {"rm": ["sft"], "dpo": ["sft"], "ppo": ["sft", "rm"]}.get(stage, []):
        shutil.copytree(chain.folder / before, folder / before)

    def progress(trainer, stage):
        shown(trainer, stage)
        first = next(p for p in trainer.model.parameters() if p.requires_grad)
        first.register_hook(lambda gradient: gradient * float("nan"))

    monkeypatch.setattr(terminal, "progress", progress)
    code, output = run(stage, *chain.overrides(stage), f"run={folder.name}")
    assert code == 2 and "Traceback" not in output
    assert "the gradient norm became nan at step 0.\nIts rows:\n  " in output
    assert not (folder / stage).exists()


KILLING = '''
import os, signal
from pathlib import Path

HERE = Path(__file__).parent

def brevity(completions, **kwargs):
    """Kills its process at the first rollout after the first checkpoint, once."""
    if (HERE / "kill").exists() and any(HERE.glob("broken/ppo/checkpoints/checkpoint-4/trainer_state.json")):
        (HERE / "kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [-len(completion) / 100 for completion in completions]
'''


@quantized
def test_a_killed_ppo_run_resumes_and_ends_with_the_weights_of_an_unbroken_one(chain, tmp_path):
    """The command itself, killed with no time to say good-bye; its reward is a mix of reward model and function."""
    (tmp_path / "mine.py").write_text(KILLING)
    args = [
        *(a for a in chain.overrides("ppo") if not a.startswith("runs_dir")),
        *(f"runs_dir={tmp_path}", "training.max_steps=8", "training.load_best_model_at_end=false"),
        *(f"reward.functions=[{tmp_path / 'mine.py'}:brevity]", "reward.weights=[1,0.5]"),
    ]
    for name in ("whole", "broken"):
        for stage in ("sft", "rm"):
            shutil.copytree(chain.folder / stage, tmp_path / name / stage)
    done("ppo", *args, "run=whole")
    (tmp_path / "kill").touch()
    command = [sys.executable, "-m", "recipes.ppo", *args, "run=broken"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert not (tmp_path / "broken/ppo/adapter_model.safetensors").exists()

    assert "resumes from checkpoint-4" in done("ppo", *args, "run=broken")
    names = ["adapter_model.safetensors", "value/adapter_model.safetensors", "value/head.json"]
    broken, whole = ([tmp_path / run_name / "ppo" / name for name in names] for run_name in ("broken", "whole"))
    assert sha(*broken) == sha(*whole)
    states = [json.loads((tmp_path / run_name / "ppo/ppo_state.json").read_text()) for run_name in ("broken", "whole")]
    for state in states:
        del state["self_test"]["seconds"]
    assert states[0] == states[1]
    assert (tmp_path / "broken/ppo/samples.json").read_text() == (tmp_path / "whole/ppo/samples.json").read_text()


# ---- eval: the run's policies and others, side by side


@pytest.fixture(scope="module")
def compared(chain, tmp_path_factory):
    """A copy of the run, compared once: its folder, the overrides, and what was written to the terminal."""
    folder = tmp_path_factory.mktemp("eval") / chain.folder.name
    shutil.copytree(chain.folder, folder)
    args = [*chain.args, f"runs_dir={folder.parent}", "eval.best_of=[2,4]", "evaluation.samples=2"]
    return folder, args, done("eval", *args)


def evaluated(folder, name="metrics.json"):
    return json.loads((folder / "eval" / name).read_text())


def test_eval_measures_every_policy_of_the_run_and_the_best_of_n(compared):
    folder, _, output = compared
    metrics = evaluated(folder)
    assert [*metrics["policies"]] == ["base", "sft", "dpo", "ppo", "best-of-2", "best-of-4"]
    for name, measured in metrics["policies"].items():
        kl = {"KL to SFT", "KL to base"} if not name.startswith("best") else set()
        assert {"gold", "reward", "reward spread", "length", "EOS", "distinct-2", "repetition"} | kl <= {*measured}
    assert metrics["policies"]["sft"]["KL to SFT"] == metrics["policies"]["base"]["KL to base"] == [0, 0]
    assert metrics["policies"]["sft"]["KL to base"][0] > 0
    assert [row["n"] for row in metrics["best_of_n"]] == [2, 4]
    rewards = {name: measured["reward"][0] for name, measured in metrics["policies"].items()}
    assert rewards["best-of-4"] > rewards["best-of-2"] > rewards["base"]
    wins = [(row["policy"], row["judge"], row["evidence"]) for row in metrics["win_rates"]]
    others = ("base", "dpo", "ppo", "best-of-2", "best-of-4")
    # DPO learned the same pairs as the reward model
    seen = [(p, "the run's reward model", p == "base") for p in others]
    assert wins == [(p, "gold", True) for p in others] + seen
    assert all(low <= mean <= high for row in metrics["win_rates"] for mean, low, high, *_ in [row["win_rate"]])
    assert metrics["reward_model"]["accuracy"] == json.loads((folder / "rm/metrics.json").read_text())["accuracy"]
    assert metrics["kept"] == {"ppo": json.loads((folder / "ppo/metrics.json").read_text())["kept"]}
    assert "no evidence" in output and "at equal length" in output


def test_eval_answers_as_the_stages_did(chain, compared):
    folder, args, _ = compared
    done("eval", *args, "evaluation.samples=1", "eval.best_of=null")
    rows = evaluated(folder, "samples.json")
    for stage in ("sft", "dpo", "ppo"):
        told = chain.json(stage, "samples.json")["samples"]
        assert [row["completions"][stage]["text"] for row in rows] == [row[stage] for row in told]
    done("eval", *args)


@in_full_precision
def test_what_was_answered_is_not_drawn_again_and_what_is_missing_is(compared):
    folder, args, _ = compared
    kept = {f: f.stat().st_mtime_ns for f in (folder / "eval" / "answers").iterdir()}
    before = evaluated(folder)
    assert "answering" not in done("eval", *args)
    assert {f: f.stat().st_mtime_ns for f in (folder / "eval" / "answers").iterdir()} == kept
    (folder / "eval" / "answers" / "ppo.json").unlink()
    (folder / "eval" / "answers" / "best-of-2.json").write_text('{"name": "best')
    output = done("eval", *args)
    assert "ppo: answering" in output and "sft: answering" not in output and "best of 2: sampling" in output
    assert evaluated(folder) == before


@in_full_precision
def test_answers_of_another_seed_are_told_and_drawn_again(compared):
    folder, args, _ = compared
    output = done("eval", *args, "seed=7", "eval.policies=[sft,ppo]", "eval.best_of=null")
    assert "The answers of ppo are of another comparison" in output and "seed: 0 -> 7" in output
    assert [*evaluated(folder)["policies"]] == ["sft", "ppo"]
    done("eval", *args)


def test_a_model_of_its_own_answers_as_it_does_in_the_run(compared, tmp_path):
    """The embedded base under its folder's name, and the PPO adapter outside of any run."""
    folder, args, _ = compared
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "ppo" / file, adapter)
    done("eval", *args, f"eval.policies=[base,ppo,{world.BASE},{adapter}]", "eval.best_of=null")
    rows, policies = evaluated(folder, "samples.json"), evaluated(folder)["policies"]
    for own, here in ((str(world.BASE), "base"), (str(adapter), "ppo")):
        assert all(row["completions"][own]["text"] == row["completions"][here]["text"] for row in rows)
        assert policies[own]["reward"][0] == pytest.approx(policies[here]["reward"][0], abs=1e-3)
    done("eval", *args)


@in_full_precision
def test_eval_asks_a_judge_and_asks_it_only_once(compared):
    from judge_server import prefers, serving

    folder, args, _ = compared
    with serving(prefers("not")) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        judge = [*args, "judge=endpoint", f"judge.url={url}", "judge.model=qwen", "eval.policies=[sft,ppo]"]
        done("eval", *judge)
        asked = len(server.asked)
        done("eval", *judge)
        assert asked > 0 and len(server.asked) == asked
    rows = [row for row in evaluated(folder)["win_rates"] if row["judge"] == f"qwen at {url}"]
    assert [row["policy"] for row in rows] == ["ppo", "best-of-2", "best-of-4"]
    assert all(row["evidence"] and row["failed"] == 0 for row in rows)
    code, output = run("eval", *judge)
    assert code == 2 and "no judge answers at" in output and "answering" not in output
    done("eval", *args)


@in_full_precision
def test_eval_measures_the_reward_model_by_category_and_runs_lm_eval(compared, tmp_path):
    folder, args, _ = compared
    rows = [row for row in world.pairs(world.rankings(1)["test"])[:12]]
    bench = tmp_path / "bench.jsonl"
    bench.write_text(
        "\n".join(
            json.dumps({"prompt": p, "chosen": c, "rejected": r, "subset": f"part {i % 2}"})
            for i, (p, c, r) in enumerate(rows)
        )
    )
    questions = tmp_path / "questions.jsonl"
    asked = world.demonstrations()["test"][:6]
    questions.write_text("\n".join(json.dumps({"q": r["prompt"], "right": r["completion"]}) for r in asked))
    (tmp_path / "isles.yaml").write_text(
        f"task: isles\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {questions}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: 0\n'
        'doc_to_choice: "{{[right, \' qqq qqq qqq.\']}}"\ntarget_delimiter: ""\nmetric_list:\n  - metric: acc\n'
    )
    done(
        *("eval", *args, "eval.policies=[base,sft]", "eval.best_of=null", f"eval.reward_bench={bench}"),
        *("eval.benchmarks=[isles]", f"eval.benchmark_tasks={tmp_path}"),
    )
    metrics = evaluated(folder)
    assert {name: of["pairs"] for name, of in metrics["reward_model"]["categories"].items()} == {
        "part 0": 6,
        "part 1": 6,
    }
    assert {policy: of["isles"]["acc"] for policy, of in metrics["benchmarks"].items()} == {"base": 1, "sft": 1}
    done("eval", *args)


@in_full_precision
def test_eval_refuses_before_it_loads_and_leaves_nothing_behind(chain, tmp_path):
    folder = tmp_path / chain.folder.name
    shutil.copytree(chain.folder, folder)
    args = [*chain.args, f"runs_dir={tmp_path}"]
    for fault, told in {
        "eval.policies=[sft,pop]": "pop is no policy",
        "judge.reward_model=" + str(folder / "rm"): "is the run's own reward model",
        "judge.url=http://127.0.0.1:9/v1": "judge.url needs judge.model",
        "lora.r=3": "made with another base or adapter",
        "run=never": "is no run",
    }.items():
        code, output = run("eval", *args, fault)
        assert code == 2 and told in output, output
        assert not (folder / "eval").exists() and not (tmp_path / "never").exists()


@pytest.mark.slow
def test_of_two_processes_one_writes_the_scale_of_a_reward_model_and_the_other_is_waited_for(shared, tmp_path):
    """The second reads the folder late: by then the first must not have moved it into the stage."""
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\nfrom rlhf_recipes import evaluation\nown = evaluation.rewards\n"
        "def late(*args):\n    time.sleep(3 * int(os.environ['RANK']))\n    return own(*args)\n"
        "evaluation.rewards = late\nfrom recipes.rm import main\nmain()\n"
    )
    overrides = [*shared, f"runs_dir={tmp_path}", "run=two", "start=model", "hardware=cpu", "training.ddp_backend=gloo"]
    overrides += ["training.max_steps=1", "evaluation.max_new_tokens=4"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *overrides],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert json.loads((tmp_path / "two" / "rm" / "head.json").read_text())["std"] > 0
    assert not (tmp_path / "two" / "rm" / ".saving").exists()
