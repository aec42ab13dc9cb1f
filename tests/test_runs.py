"""Run folders: what opening a stage decides, and that no kill, full disk or second process spoils one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from itertools import groupby
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import Made, Stage, disk, make_command
from rlhf_recipes.runs import stage as stage_module
from rlhf_recipes.runs.manifest import read_manifest

ROOT = Path(__file__).parents[1]
DATA = {"heldout": 0.1, "sources": [{"path": "world", "weight": 1.0}]}


@pytest.fixture
def config(tmp_path):
    """A composed config with changes: config(overwrite=True, **{"training.beta": 0.1})."""

    def make(**changes):
        cfg = OmegaConf.create(
            {
                "run": "mine",
                "runs_dir": str(tmp_path / "runs"),
                "overwrite": False,
                "seed": 0,
                "model": {"name_or_path": "embedded", "revision": None},
                "data": {"sft": "world", "preferences": "world", "prompts": "world"},
                "training": {"learning_rate": 1e-4, "logging_steps": 5, "max_steps": "???"},
            }
        )
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value)
        return cfg

    return make


def weights(text):
    """A `save` that writes one adapter file, and one in a folder of its own."""

    def save(folder):
        Path(folder, "adapter_model.safetensors").write_text(text)
        Path(folder, "value").mkdir()
        Path(folder, "value", "head.safetensors").write_text(text)

    return save


def opened(cfg, name, *predecessors, data=DATA, overrides=()):
    return Stage.open(cfg, name, predecessors=predecessors, data_fingerprint=data, overrides=overrides)


def made(cfg, name, *predecessors, text="w", data=DATA, overrides=("run=mine",)):
    with opened(cfg, name, *predecessors, data=data, overrides=overrides) as stage:
        assert stage.state == "start"
        stage.finish({"gold": 0.7, "sft": {"helpful": (0.7, 0.02)}}, save=weights(text), base_fingerprint="b1")
    return stage


def checkpoint(stage_or_path, step, state=True):
    """A checkpoint folder as transformers leaves it, with or without the file that it writes last."""
    folder = Path(getattr(stage_or_path, "path", stage_or_path)) / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_text("w")
    if state:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


# What opening decides


def test_a_finished_stage_holds_artefacts_figures_config_manifest_and_card(config):
    stage = made(config(), "sft")
    files = {str(p.relative_to(stage.path)) for p in stage.path.rglob("*") if p.is_file()}
    assert files == {
        *("adapter_model.safetensors", "value/head.safetensors", "config.yaml", "metrics.json", "manifest.json"),
        *("README.md", ".lock"),
    }
    assert json.loads((stage.path / "metrics.json").read_text()) == {"gold": 0.7, "sft": {"helpful": [0.7, 0.02]}}
    manifest = json.loads((stage.path / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["seed"] == 0 and manifest["base"] == "b1"
    assert manifest["versions"]["trl"].startswith("1.16") and manifest["data"] == DATA
    assert set(manifest["files"]) == {"adapter_model.safetensors", "value/head.safetensors"}
    assert manifest["peak_memory"]["rss"] > 1
    assert OmegaConf.load(stage.path / "config.yaml").training == {"learning_rate": 1e-4, "logging_steps": 5}
    card = (stage.path / "README.md").read_text()
    assert (
        "python -m recipes.sft run=mine\n" in card
        and "| gold | 0.7 |\n| sft.helpful | 0.70 ± 0.02 |" in card
        and stage.manifest["fingerprint"] in card
    )


def test_artefacts_may_be_saved_one_by_one(config):
    with opened(config(), "rm") as stage:
        (stage.saving / "adapter_model.safetensors").write_text("w")
        (stage.saving / "scale.json").write_text("{}")
        stage.finish({})
    assert set(Made.read(stage.path).manifest["files"]) == {"adapter_model.safetensors", "scale.json"}
    assert not (stage.path / ".saving").exists()


def test_a_finished_unchanged_stage_is_skipped_with_a_line(config):
    made(config(), "sft")
    stage = opened(config(), "sft")
    assert stage.state == "skip"
    assert re.search(r"runs/mine/sft is finished \(\d{4}-.*\) and unchanged: skipped", stage.message)


def test_a_skip_imports_no_torch_and_takes_less_than_three_seconds(config, tmp_path):
    made(config(), "sft")
    OmegaConf.save(config(), tmp_path / "cfg.yaml")
    code = f"""
        import sys
        from omegaconf import OmegaConf
        from rlhf_recipes.runs import Stage
        stage = Stage.open(OmegaConf.load({str(tmp_path / "cfg.yaml")!r}), "sft", data_fingerprint={DATA!r})
        assert stage.state == "skip", stage
        assert not {{"torch", "transformers", "datasets"}} & set(sys.modules)
    """
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)
    assert time.perf_counter() - begun < 3


def test_keys_that_do_not_change_the_result_do_not_count(config):
    made(config(), "sft")
    changed = config(**{"training.logging_steps": 1, "training.report_to": ["wandb"], "start": "sft", "trunk": 0.25})
    assert opened(changed, "sft").state == "skip"
    assert opened(config(**{"model.chat_template": None}), "sft").state == "skip"  # a key of ours that came later


def test_a_finished_stage_with_another_config_is_refused_with_every_difference(config):
    made(config(), "sft")
    changed = config(
        **{"training.learning_rate": 1e-3, "training.max_steps": 60, "seed": 1, "training.max_length": None}
    )
    with pytest.raises(UserError) as error:
        opened(changed, "sft", data={**DATA, "heldout": 0.2})
    text = str(error.value)
    for line in (
        *("training.learning_rate: 0.0001 -> 0.001", "training.max_steps: (not set) -> 60", "seed: 0 -> 1"),
        *("training.max_length: (not set) -> null", "data.heldout: 0.1 -> 0.2"),
        *("run=<new name>", "overwrite=true"),
    ):
        assert line in text


def test_how_the_data_are_written_down_does_not_count_but_their_fingerprint_does(config):
    made(config(), "sft")
    assert opened(config(**{"data.prompts": "other.jsonl"}), "sft").state == "skip"
    with pytest.raises(UserError, match=r"data.sources.0.path: world -> x.jsonl"):
        opened(config(), "sft", data={"heldout": 0.1, "sources": [{"path": "x.jsonl", "weight": 1.0}]})


def test_overwrite_removes_that_stage_alone_and_names_the_stale_ones(config):
    made(config(), "sft")
    rm = made(config(), "rm", "sft")
    sweep = rm.path.parent / "sft" / "training.beta=0.1"
    sweep.mkdir()
    (sweep / "manifest.json").write_text("{}")
    checkpoint(sweep.parent, 3)
    with opened(config(overwrite=True, seed=1), "sft") as stage:
        assert stage.state == "start" and stage.resume_from is None
        assert "must be made again too: rm" in stage.message
        assert not (stage.path / "adapter_model.safetensors").exists() and not stage.checkpoints_dir.exists()
    assert sweep.exists() and (rm.path / "adapter_model.safetensors").exists()


def test_an_overwrite_killed_while_removing_does_not_resume_from_old_checkpoints(config):
    stage = made(config(), "sft")
    checkpoint(stage, 9)
    disk.write_json(stage.path / "manifest.json", stage.manifest | {"status": "removing"})
    with opened(config(seed=1), "sft") as again:
        assert again.state == "start" and not again.checkpoints_dir.exists()


def test_a_missing_artefact_is_noticed(config):
    stage = made(config(), "sft")
    (stage.path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no longer whole:\n  adapter_model.safetensors is missing\n.*overwrite=true"):
        opened(config(), "sft")


def test_a_folder_with_files_that_no_stage_made_is_left_alone(config, tmp_path):
    folder = tmp_path / "runs" / "mine" / "sft"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis.txt"):
        opened(config(overwrite=True), "sft")
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("run", ["../up", "a/b", "", ".hidden", "a b"])
def test_a_run_name_that_is_no_folder_name_is_refused(config, run):
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        opened(config(run=run), "sft")


# Resuming


def test_an_unfinished_stage_resumes_from_its_newest_complete_checkpoint(config):
    with opened(config(), "sft") as stage:
        checkpoint(stage, 8)
        newest = checkpoint(stage, 10)
        broken = checkpoint(stage, 12, state=False)
    with opened(config(), "sft") as stage:
        assert (stage.state, stage.resume_from) == ("resume", str(newest))
        assert "resumes from checkpoint-10" in stage.message
        assert not broken.exists()  # or the trainer's save_total_limit would count it
        assert stage.manifest["attempts"] == 2


def test_a_checkpoint_whose_last_file_is_cut_short_is_not_chosen(config):
    with opened(config(), "sft") as stage:
        checkpoint(stage, 8)
        (checkpoint(stage, 10) / "trainer_state.json").write_text('{"global_step": 10, "log_hist')
    with opened(config(), "sft") as stage:
        assert stage.resume_from == str(stage.checkpoints_dir / "checkpoint-8")


def test_without_a_checkpoint_a_broken_off_stage_starts_again_even_with_another_config(config):
    opened(config(), "sft").close()
    with opened(config(**{"training.learning_rate": 1.0}), "sft") as stage:
        assert stage.state == "start" and "broken off before its first checkpoint" in stage.message
        assert stage.manifest["config"]["training"]["learning_rate"] == 1.0


def test_resuming_with_another_config_is_refused(config):
    with opened(config(), "sft") as stage:
        checkpoint(stage, 8)
    with pytest.raises(
        UserError, match=r"unfinished(.|\n)*learning_rate: 0.0001 -> 1.0(.|\n)*go on with the old values"
    ):
        opened(config(**{"training.learning_rate": 1.0}), "sft")
    with opened(config(), "sft") as stage:  # the refusal changed nothing
        assert stage.state == "resume"


def test_time_counts_the_earlier_attempt_up_to_the_checkpoint(config):
    with opened(config(), "sft") as stage:
        state = checkpoint(stage, 8) / "trainer_state.json"
        written = time.time() + 100
        os.utime(state, (written, written))
    with opened(config(), "sft") as stage:
        assert 99 < stage.seconds < 105


def test_transformers_writes_the_file_last_that_completeness_is_read_from(
    tiny_policy, tokenizer, tmp_path, monkeypatch
):
    from datasets import Dataset
    from transformers import TrainerState
    from trl import SFTConfig, SFTTrainer

    there = []
    save = TrainerState.save_to_json
    monkeypatch.setattr(
        TrainerState,
        "save_to_json",
        lambda self, path: (there.append({*os.listdir(Path(path).parent)}), save(self, path)),
    )
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, save_steps=1, bf16=False, report_to="none", disable_tqdm=True
    )
    rows = Dataset.from_list([{"prompt": "w1", "completion": " w2"}] * 16)
    SFTTrainer(tiny_policy(), args, train_dataset=rows, processing_class=tokenizer).train()
    for step, before in zip((1, 2), there, strict=False):
        folder = tmp_path / f"checkpoint-{step}"
        assert {p.name for p in folder.iterdir()} == before | {"trainer_state.json"}
        assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= before
        assert stage_module._complete(folder)


@pytest.fixture
def trained(config, tiny_policy, tokenizer):
    """A function that opens a stage and trains in it, to step 10 in epochs of eight, the best checkpoint being that of
    step 4; it is broken off in its final evaluation, or finished."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": f"w{i}", "completion": f" w{i % 3}"} for i in range(32)])
    settings = {
        **{"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False},
        **{"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "save_total_limit": 1, "logging_steps": 1},
        **{"metric_for_best_model": "eval_loss", "greater_is_better": True, "report_to": "none", "disable_tqdm": True},
    }

    def train(finish, **options):
        with opened(config(), "sft") as stage:
            args = SFTConfig(str(stage.checkpoints_dir), **{"load_best_model_at_end": True} | settings | options)
            trainer = SFTTrainer(
                tiny_policy(), args, train_dataset=rows, eval_dataset=rows.select(range(4)), processing_class=tokenizer
            )
            stage.train(trainer)
            there = sorted(p.name for p in stage.checkpoints_dir.glob("checkpoint-*"))
            if finish:
                stage.finish({}, save=trainer.save_model)
        return stage, trainer, there

    return train


def test_the_newest_checkpoint_stays_until_the_stage_is_finished(trained):
    _, _, there = trained(finish=False)
    assert there == ["checkpoint-10", "checkpoint-4"]
    resumed, trainer, _ = trained(finish=True)
    assert resumed.resume_from.endswith("checkpoint-10")
    assert [p.name for p in resumed.checkpoints_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")


@pytest.mark.parametrize("best", [True, False])
def test_a_training_that_had_ended_takes_no_step_more(trained, tmp_path, best):
    """The Trainer would take one: step 10 is in the middle of an epoch."""
    stage, unbroken, _ = trained(finish=True, load_best_model_at_end=best)
    stage.path.rename(tmp_path / "unbroken")
    trained(finish=False, load_best_model_at_end=best)
    stage, resumed, _ = trained(finish=True, load_best_model_at_end=best)
    assert stage.state == "resume" and resumed.state.global_step == 10
    assert Made.read(tmp_path / "unbroken").fingerprint == Made.read(stage.path).fingerprint
    steps = [[row["step"] for row in trainer.state.log_history] for trainer in (unbroken, resumed)]
    assert steps[1] == steps[0][:-1]  # without the summary of the training, of which nothing was left


def test_a_resume_with_smaller_micro_batches_goes_on_with_the_same_rows(trained, tmp_path):
    options = {"load_best_model_at_end": False, "save_total_limit": 3}
    stage, unbroken, _ = trained(finish=False, **options)
    shutil.rmtree(stage.checkpoints_dir / "checkpoint-10")
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    stage, resumed, _ = trained(finish=False, **options, **smaller)
    assert stage.resume_from.endswith("checkpoint-8")
    for one, other in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-4


TRAINING = """
    import os, sys
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, "tests")
    import torch
    from conftest import WORDS
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    from rlhf_recipes.runs import Stage

    runs_dir, kill_at = sys.argv[1], int(sys.argv[2])
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    ))
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"prompt": f"w{i} w{j}", "completion": f" w{(i + j) % 40}"} for i in range(8) for j in range(8)]
    cfg = {"run": "mine", "runs_dir": runs_dir, "overwrite": False, "seed": 0}

    torch_save = torch.save
    def save(value, file, *args, **kwargs):
        torch_save(value, file, *args, **kwargs)
        if f"checkpoint-{kill_at}/optimizer" in str(file):
            os.kill(os.getpid(), 9)  # in the middle of a checkpoint
    torch.save = save

    with Stage.open(cfg, "sft", data_fingerprint={}) as stage:
        print(stage.state, stage.resume_from, flush=True)
        args = SFTConfig(
            output_dir=str(stage.checkpoints_dir), max_steps=8, save_steps=2, per_device_train_batch_size=4,
            learning_rate=1e-2, bf16=False, report_to="none", disable_tqdm=True,
        )
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        stage.train(trainer)
        stage.finish({}, save=trainer.save_model)
"""


@pytest.mark.slow
def test_a_training_killed_in_the_middle_of_a_checkpoint_resumes_to_the_same_weights(tmp_path):
    writers = [process(TRAINING, tmp_path / "broken", 6), process(TRAINING, tmp_path / "unbroken", -1)]
    (broken, _), (_, errors) = (writer.communicate() for writer in writers)
    assert (broken.splitlines()[0], writers[0].returncode) == ("start None", -signal.SIGKILL)
    assert writers[1].returncode == 0, errors
    resumed, errors = process(TRAINING, tmp_path / "broken", -1).communicate()
    assert resumed.startswith(f"resume {tmp_path}/broken/mine/sft/checkpoints/checkpoint-4"), errors
    one, two = (Made.read(tmp_path / name / "mine" / "sft") for name in ("broken", "unbroken"))
    adapter = "adapter_model.safetensors"
    assert one.manifest["files"][adapter] == two.manifest["files"][adapter]
    assert one.fingerprint == two.fingerprint


# Predecessors


def test_a_missing_predecessor_names_the_command_with_what_the_stages_share(config):
    overrides = ["run=mine", "model=qwen2.5-0.5b", "lora.r=32", "training.beta=0.1", "reward=length"]
    with pytest.raises(UserError) as error:
        opened(config(), "ppo", "sft", "rm", overrides=overrides)
    assert str(error.value).endswith('Make it first: make sft ARGS="run=mine model=qwen2.5-0.5b lora.r=32"')
    assert make_command(["sft"], ["training.beta=0.1"]) == "make sft"
    assert (
        make_command(["sft"], ["data.sft.path=my files/*.jsonl"])
        == "make sft ARGS=\"'data.sft.path=my files/*.jsonl'\""
    )


def test_an_unfinished_predecessor_is_to_be_finished_first(config):
    opened(config(), "sft").close()
    with pytest.raises(UserError, match=r"sft is unfinished. Finish it first: make sft"):
        opened(config(), "rm", "sft")


def test_a_predecessor_made_again_with_other_weights_makes_its_heirs_stale(config):
    made(config(), "sft", text="old")
    made(config(), "rm", "sft")
    assert opened(config(), "rm", "sft").state == "skip"
    made(config(overwrite=True), "sft", text="new")
    with pytest.raises(UserError, match=r"made again since, sft: \w+ -> \w+"):
        opened(config(), "rm", "sft")
    with pytest.raises(UserError, match=r'rm came from another sft .* make rm ARGS="run=mine overwrite=true"'):
        opened(config(), "ppo", "sft", "rm", overrides=["run=mine"])


def test_a_predecessor_made_again_with_equal_weights_changes_nothing(config):
    made(config(), "sft")
    made(config(), "rm", "sft")
    made(config(overwrite=True), "sft")
    assert opened(config(), "rm", "sft").state == "skip"


def test_a_finished_stage_is_skipped_when_its_predecessor_was_cleared_away(config):
    sft = made(config(), "sft")
    made(config(), "rm", "sft")
    (sft.path / "manifest.json").unlink()
    assert opened(config(), "rm", "sft").state == "skip"


def test_an_adapter_of_another_run_is_checked_and_noted_as_a_predecessor_is(config, tmp_path):
    other, foreign = made(config(run="other"), "rm", text="w2").path, tmp_path / "from_elsewhere"
    foreign.mkdir()

    def open_ppo(*others, **changes):
        return Stage.open(config(**changes), "ppo", others=others, data_fingerprint=DATA, overrides=["run=mine"])

    with open_ppo(other, foreign) as stage:
        assert stage.manifest["predecessors"] == {str(other): read_manifest(other)["fingerprint"]}
        with pytest.raises(UserError, match=f"{other}: b1"):
            stage.check_base("b2")
        stage.finish({}, save=weights("p"), base_fingerprint="b1")
    assert open_ppo(other, foreign).state == "skip"
    (other / "adapter_model.safetensors").write_text("ww")
    with pytest.raises(UserError, match="safetensors has changed"):
        open_ppo(other, run="new")


def test_a_predecessor_with_changed_weights_is_refused(config):
    stage = made(config(), "sft")
    (stage.path / "adapter_model.safetensors").write_text("W")  # same size
    with pytest.raises(UserError, match=r"adapter_model.safetensors has changed"):
        opened(config(), "rm", "sft")
    with pytest.raises(UserError, match=r"adapter_model.safetensors has changed"):
        Made.read(stage.path)


def test_adapters_of_another_base_are_refused(config):
    made(config(), "sft")
    with opened(config(), "rm", "sft") as stage:
        assert stage.adapter("sft") == stage.path.parent / "sft" and stage.adapter("rm") is None
        stage.check_base("b1")
        with pytest.raises(UserError, match=r"fingerprint b2(.|\n)*mine/sft: b1"):
            stage.check_base("b2")


# Kills, full disks, second processes


def process(body, *arguments, **options):
    code = "import sys\nfrom pathlib import Path\nfrom rlhf_recipes.runs import Stage\n" + textwrap.dedent(body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, **pipes, **options)


OPEN = """
    runs_dir, size = sys.argv[1], int(sys.argv[2])
    cfg = {"run": "mine", "runs_dir": runs_dir, "overwrite": True, "seed": 0}
    def save(folder):
        for name in "abcdefgh":
            Path(folder, name).write_bytes(b"x" * size)
"""


def test_a_kill_at_any_moment_leaves_no_stage_that_looks_finished_and_is_not(tmp_path):
    """A child makes a finished stage anew and is killed at its n-th work on files, for every n there is."""
    body = (
        OPEN
        + """
    import os, shutil, signal
    def make():
        with Stage.open(cfg, "sft", data_fingerprint={}) as stage:
            stage.finish({}, save=save)
    def killed_at(last):
        if os.fork() == 0:
            cfg["runs_dir"] = f"{runs_dir}/{last}"
            shutil.copytree(f"{runs_dir}/whole", cfg["runs_dir"])
            events = 0
            def count(event, _):
                nonlocal events
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                    events += 1
                    if events == last:
                        os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(count)
            make()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    cfg["runs_dir"] = f"{runs_dir}/whole"
    make()
    moment = 1
    while killed_at(moment):
        moment += 1
    """
    )
    writer = process(body, tmp_path, 1000)
    assert (writer.communicate()[1], writer.returncode) == ("", 0)
    seen = []
    for moment in range(1, len(list(tmp_path.iterdir()))):
        runs_dir = tmp_path / str(moment)
        manifest = read_manifest(runs_dir / "mine" / "sft")
        seen.append(manifest["status"] if manifest else None)
        if seen[-1] == "finished":
            Made.read(runs_dir / "mine" / "sft")  # raises if an artefact is missing or cut short
        cfg = {"run": "mine", "runs_dir": str(runs_dir), "overwrite": False, "seed": 0}
        with Stage.open(cfg, "sft", data_fingerprint={}):
            pass  # never needs mending by hand
    assert [status for status, _ in groupby(seen)] == ["finished", "removing", "unfinished", "finished"]


def test_a_second_process_is_told_who_holds_the_stage_and_a_dead_one_holds_nothing(tmp_path):
    body = (
        OPEN
        + """
    import os, time
    stage = Stage.open(cfg, "sft", data_fingerprint={})
    if os.fork() == 0:  # a data worker that outlives its trainer
        time.sleep(20)
    print("open", flush=True)
    time.sleep(20)
    """
    )
    first = process(body, tmp_path, 1, start_new_session=True)
    try:
        assert first.stdout.readline() == "open\n"
        cfg = {"run": "mine", "runs_dir": str(tmp_path), "overwrite": False, "seed": 0}
        with pytest.raises(UserError, match=rf"being made by process {first.pid}"):
            Stage.open(cfg, "sft", data_fingerprint={})
        with pytest.raises(UserError, match=rf"sft is being made by process {first.pid}: wait"):
            Stage.open(cfg, "rm", predecessors=("sft",), data_fingerprint={})
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with Stage.open(cfg, "sft", data_fingerprint={}) as stage:
            assert stage.state == "start"
    finally:
        os.killpg(first.pid, signal.SIGKILL)


def test_a_disk_that_fills_up_gives_one_plain_message_and_keeps_the_checkpoints(tmp_path):
    body = (
        OPEN
        + """
    import resource
    from rlhf_recipes.errors import UserError
    cfg["overwrite"] = False
    try:
        with Stage.open(cfg, "sft", data_fingerprint={}) as stage:
            for step in (5, 10):
                folder = stage.checkpoints_dir / f"checkpoint-{step}"
                folder.mkdir(parents=True)
                (folder / "trainer_state.json").write_text('{"global_step": %d}' % step)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            if size < 0:
                (stage.checkpoints_dir / "checkpoint-15").mkdir()
                (stage.checkpoints_dir / "checkpoint-15" / "optimizer.pt").write_bytes(b"x" * -size)
            stage.finish({}, save=save)
    except UserError as error:
        print(error)
    """
    )
    for size in (200_000, -200_000):
        output, errors = process(body, tmp_path / str(size), size).communicate()
        assert errors == "" and output.startswith("The disk is full (") and output.count("\n") == 1
        path = tmp_path / str(size) / "mine" / "sft"
        assert {p.name for p in path.iterdir()} == {".lock", "manifest.json", "config.yaml", "checkpoints"}
        with Stage.open(
            {"run": "mine", "runs_dir": str(path.parents[1]), "overwrite": False, "seed": 0}, "sft", data_fingerprint={}
        ) as stage:
            assert stage.resume_from == str(stage.checkpoints_dir / "checkpoint-10")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk, as root")
@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_full_disk_is_recognised_in_what_the_libraries_raise(tmp_path, library):
    import torch
    from safetensors.torch import save_file

    disk_of_1_mb = tmp_path / "small"
    disk_of_1_mb.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk_of_1_mb], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        large = {"weight": torch.zeros(1_000_000)}
        with pytest.raises(Exception) as error:
            if library == "torch":
                torch.save(large, disk_of_1_mb / "large.pt")
            else:
                save_file(large, disk_of_1_mb / "large.safetensors")
        assert "disk is full (" in str(disk.disk_fault(error.value, disk_of_1_mb))
    finally:
        subprocess.run(["umount", "--lazy", disk_of_1_mb], check=True)
    assert disk.disk_fault(RuntimeError("CUDA out of memory"), tmp_path) is None


def test_another_process_of_the_same_training_comes_to_the_same_decision_and_writes_nothing(config, monkeypatch):
    with opened(config(), "sft") as first:
        newest = checkpoint(first, 8)
    with opened(config(), "sft") as first:
        before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
        monkeypatch.setenv("RANK", "1")
        with opened(config(), "sft") as second:
            assert (second.state, second.resume_from) == ("resume", str(newest)) == (first.state, first.resume_from)
            second.finish({}, save=weights("w"))
        assert {p: p.stat().st_mtime_ns for p in first.path.rglob("*")} == before


# Sweeps and fingerprints


def test_the_jobs_of_a_sweep_lie_beside_each_other_and_share_the_stages_before(config, tmp_path):
    made(config(model={"name_or_path": "a/b"}), "sft")
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import hydra
        from rlhf_recipes.runs import Stage
        @hydra.main(version_base="1.3", config_path=".", config_name="cfg")
        def main(cfg):
            with Stage.open(cfg, "ppo", predecessors=("sft",), data_fingerprint={{}}) as stage:
                stage.finish({{}}, base_fingerprint="b1")
        main()
        """)
    )
    OmegaConf.save(
        OmegaConf.merge(config(), {"hydra": {"output_subdir": None, "sweep": {"dir": str(tmp_path / "hydra")}}}),
        tmp_path / "cfg.yaml",
    )
    command = [
        sys.executable,
        str(script),
        "-m",
        "run=mine",
        "++training.learning_rate=0.1,0.2",
        "model.name_or_path=a/b",
    ]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    ppo = tmp_path / "runs" / "mine" / "ppo"
    assert {p.name for p in ppo.iterdir()} == {"training.learning_rate=0.1", "training.learning_rate=0.2"}
    assert Made.read(ppo / "training.learning_rate=0.1").manifest["config"]["training"]["learning_rate"] == 0.1


def test_a_fingerprint_follows_names_and_contents_and_not_the_folder(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(300_000))
    one, two = tmp_path / "one", tmp_path / "two"
    assert disk.fingerprint_files(one) == disk.fingerprint_files(two)
    (two / "model.safetensors").write_bytes(bytes(299_999) + b"x")
    assert disk.fingerprint_files(one) != disk.fingerprint_files(two)
    monkeypatch.setattr(disk, "WHOLE", 1000)  # by pieces
    monkeypatch.setattr(disk, "PIECE", 16)
    assert disk.fingerprint_files(one) != disk.fingerprint_files(two)
    with pytest.raises(UserError, match=r"No file matches \*.gguf"):
        disk.fingerprint_files(one, "*.gguf")
