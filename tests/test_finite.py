"""NaN and infinity end a training with the step, the rows and the last good checkpoint, and are never published."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from gradient_scaler import scale_gradients
from safetensors.torch import load_file, save_file
from test_backoff import STAGES, dpo, ppo, rm, sft  # noqa: F401, as fixtures: a tiny trainer of each stage
from transformers import GenerationConfig, TrainerCallback

from rlhf_recipes.errors import UserError
from rlhf_recipes.evaluation.sampling import generating_by
from rlhf_recipes.finite import SKIPPED, SKIPS, StopAtNonFinite, refuse_saved, saved_non_finite
from rlhf_recipes.models import thaw
from rlhf_recipes.roles import VALUE

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}


@pytest.fixture
def make(request):
    """A function that gives a stage's trainer, watched, with what is done to it after each micro-batch, by number."""

    def make(stage, spoil=None, **options):
        trainer = request.getfixturevalue(stage)(**options)
        if stage != "ppo":
            thaw(trainer.model, trunk=0)
            StopAtNonFinite(trainer)
        watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopAtNonFinite))
        step, number = watch._step, itertools.count(1)

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            return loss if spoil is None or not (found := spoil(trainer, next(number))) else loss * found

        watch._step = training_step
        return trainer

    return make


def weights(trainer):
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def nan_gradient(at):
    def spoil(trainer, micro_batch):
        if micro_batch == at:
            next(p for p in weights(trainer) if p.grad is not None).grad.view(-1)[0] = math.nan

    return spoil


def message(trainer):
    with pytest.raises(UserError) as stopped:
        trainer.train()
    return str(stopped.value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_gradient_is_not_taken_in_and_the_named_checkpoint_goes_on_as_if_nothing_had_been(make, stage):
    trainer = make(stage, nan_gradient(at=6), **SAVING)
    told = message(trainer)
    saved = Path(trainer.args.output_dir) / "checkpoint-2"
    assert told.startswith("the gradient norm became nan at step 2.\nIts rows:\n  w1 ") or stage in ("rm", "ppo")
    assert f"{saved} is the last good checkpoint: the same command goes on from it" in told
    assert all(p.isfinite().all() for p in weights(trainer))
    resumed = make(stage, **SAVING)
    resumed.train(resume_from_checkpoint=str(saved))
    unbroken = make(stage, **SAVING)
    unbroken.train()
    assert all(map(torch.equal, weights(resumed), weights(unbroken)))


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_infinite_names_the_rows_of_its_micro_batch_alone(make, stage):
    trainer = make(stage, lambda trainer, micro_batch: math.inf if micro_batch == 2 else None)
    told = message(trainer)
    assert told.startswith("the loss became ") and "at step 0.\nIts rows:\n" in told
    rows = {"sft": 6, "rm": 12, "dpo": 12, "ppo": 6}[stage]  # 6 pairs are 12 texts
    assert told.count("\n  ") == rows
    assert "No good checkpoint was saved yet: the same command starts again" in told


def test_a_critics_nan_is_told_as_the_critics(ppo):  # noqa: F811
    trainer = ppo()
    with torch.no_grad():
        trainer.roles.trained[VALUE][0].register_hook(lambda gradient: gradient * math.nan)
    assert message(trainer).startswith("the gradient norm of the critic became nan at step 0.\nIts rows:\n")


def test_pretraining_of_the_critic_stops_too(ppo):  # noqa: F811
    trainer = ppo()
    trainer.args.value_pretraining_passes = 1
    value_gradients = trainer._value_gradients
    trainer._value_gradients = lambda inputs: [gradient * math.nan for gradient in value_gradients(inputs)]
    assert message(trainer).startswith("the gradient norm of the critic's pretraining became nan at step 0")


def test_log_probabilities_and_values_are_looked_at_before_anything_is_learned_from_them(ppo):  # noqa: F811
    trainer = ppo()
    trainer.roles.heads[VALUE].weight.data.fill_(math.nan)
    told = message(trainer)
    assert told.startswith("a value of the critic became nan at step 0.\n")
    assert "The weights themselves hold NaN or infinity: value.weight." in told
    assert told.count("\n  ") == 12  # all episodes of the rollout

    trainer = ppo()
    next(p for n, p in trainer.model.named_parameters() if ".default." in n and "layers.3" in n).data.fill_(math.nan)
    told = message(trainer)
    assert "NaN or infinit" in told and "layers.3" in told and ".default.weight" in told


@pytest.mark.parametrize("stage", STAGES)
def test_a_base_with_one_nan_weight_is_told_as_such(make, stage):
    trainer = make(stage)
    trainer.model.get_base_model().model.layers[2].mlp.down_proj.base_layer.weight.data[3, 5] = math.nan
    told = message(trainer)
    assert "hold NaN or infinity: " in told and "model.layers.2.mlp.down_proj.base_layer.weight" in told


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo"])  # PPO has no such loss
def test_a_loss_of_held_out_rows_that_is_nan_ends_the_training(make, stage):
    trainer = make(stage)
    loss = trainer.compute_loss

    def one_is_nan(*args, **kwargs):
        found = loss(*args, **kwargs)
        spoilt = math.nan if next(number) == 1 else 1.0
        return (found[0] * spoilt, found[1]) if isinstance(found, tuple) else found * spoilt

    number, trainer.compute_loss = itertools.count(), one_is_nan
    with pytest.raises(UserError, match=r"^the loss on held-out rows became nan at step 0"):
        trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_weights_that_a_step_made_infinite_are_not_saved(make, stage):
    def spoil(trainer, micro_batch):
        if micro_batch == 4:  # the last of the second step, after which a checkpoint is due
            trainer.optimizer.step = lambda: weights(trainer)[-1].data.fill_(math.inf)

    trainer = make(stage, spoil, **SAVING)
    assert message(trainer).startswith("the norm of the trained weights became nan at step 2.\nThe weights themselves")
    assert not [*Path(trainer.args.output_dir).glob("checkpoint-*")]


class Scaler(TrainerCallback):
    """What accelerate sets up for fp16 on a GPU, with torch's own GradScaler."""

    def on_train_begin(self, args, state, control, **kwargs):
        scale_gradients(self.trainer.accelerator)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_step_that_fp16_skips_is_counted_and_goes_on_and_many_in_a_row_do_not(make, stage):
    def scaled(spoil, **options):
        trainer = make(stage, spoil, **options)
        callback = Scaler()
        callback.trainer = trainer
        trainer.add_callback(callback)
        return trainer

    trainer = scaled(nan_gradient(at=2), max_steps=3, logging_steps=1)
    trainer.train()
    assert [row.get(SKIPPED) for row in trainer.state.log_history if "loss" in row] == [1, 1, 1]
    assert trainer.state.global_step == 3 and all(p.isfinite().all() for p in weights(trainer))

    if stage == "sft":
        always = scaled(lambda trainer, number: nan_gradient(number)(trainer, number), max_steps=SKIPS + 5)
        assert f"the gradient norm became nan at step {SKIPS}." in message(always)


def test_a_loss_that_is_nan_is_no_matter_of_fp16s_loss_scale(make):
    trainer = make("sft", lambda trainer, micro_batch: math.nan)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer.accelerator.unscale_gradients = lambda _=None: None
    assert message(trainer).startswith("the loss became nan at step 0.")


def test_nothing_is_told_and_no_row_is_kept_where_all_is_well(make):
    trainer = make("sft", **SAVING)
    trainer.train()
    watch = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopAtNonFinite))
    assert watch.micro_batches == [] and not any(SKIPPED in row for row in trainer.state.log_history)


# ---- what is saved


@pytest.fixture
def saved(make):
    """A folder of checkpoints at steps 2 and 4."""
    trainer = make("sft", **SAVING)
    trainer.train()
    return Path(trainer.args.output_dir)


def spoil_file(folder, number=math.nan):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[-1] = number
    save_file(tensors, file)
    return name


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_an_adapter_with_one_such_number_is_refused_by_the_tensors_name_beside_the_last_good_checkpoint(saved, number):
    refuse_saved(saved.rglob("*"), saved)
    name = spoil_file(saved / "checkpoint-4", number)
    with pytest.raises(UserError) as refused:
        refuse_saved((saved / "checkpoint-4").rglob("*"), saved)
    told = str(refused.value)
    assert f"and the stage is not finished: {name}." in told
    assert f"Remove {saved}/checkpoint-4, whose weights are not finite. {saved}/checkpoint-2 is the last good" in told


def test_a_scale_that_is_nan_is_refused_too(tmp_path):
    (tmp_path / "head.json").write_text(json.dumps({"mean": 0.5, "std": math.nan}))
    assert saved_non_finite(tmp_path.rglob("*")) == ["std"]


def test_sampling_from_a_model_with_nan_is_told_with_its_weight(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data[4, 0] = math.nan
    config = GenerationConfig(do_sample=True, max_new_tokens=2, pad_token_id=0)
    told = r"probabilities are NaN or infinite \(its weights .*: lm_head.weight\)"
    with pytest.raises(UserError, match=told), generating_by(model, config):
        model.generate(torch.tensor([[5, 6]]), generation_config=config)
