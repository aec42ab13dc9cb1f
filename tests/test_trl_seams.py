"""Every private or easily changed name of TRL, transformers, PEFT and torch that PPO, roles and recipes stand on.

After an upgrade that breaks a seam, this file fails first and says which.
"""

import ast
import functools
import inspect
import textwrap
from pathlib import Path

import peft.utils.save_and_load
import pytest
import torch
import trl.trainer.utils
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainerControl
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, ContinuousMixin
from trl import DPOTrainer, GRPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer import dpo_trainer

from rlhf_recipes import PPOTrainer
from rlhf_recipes.ppo import trainer as ppo_module

PPO_SOURCE = ast.parse(Path(ppo_module.__file__).read_text())
PPO_CLASS = next(n for n in PPO_SOURCE.body if isinstance(n, ast.ClassDef) and n.name == PPOTrainer.__name__)
OVERRIDDEN = {f.name for f in PPO_CLASS.body if isinstance(f, ast.FunctionDef) and hasattr(GRPOTrainer, f.name)}

# Methods that PPOTrainer overrides: where they are defined, and the parameters it counts on, in this order.
METHODS = {
    "__init__": (
        GRPOTrainer,
        "model reward_funcs args train_dataset eval_dataset processing_class reward_processing_classes callbacks "
        "optimizers quantization_config peft_config tools rollout_func environment_factory",
    ),
    "_generate_single_turn": (
        GRPOTrainer,
        "prompt_ids images multimodal_fields num_generations has_tool_images",
    ),
    "_generate": (GRPOTrainer, "prompts"),
    "_get_per_token_logps_and_entropies": (
        GRPOTrainer,
        "model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss",
    ),
    "_calculate_rewards": (GRPOTrainer, "inputs prompts completions completion_ids_list"),
    "_generate_and_score_completions": (GRPOTrainer, "inputs"),
    "_prepare_inputs": (GRPOTrainer, "generation_batch"),
    "_compute_loss": (GRPOTrainer, "model inputs"),
    "prediction_step": (GRPOTrainer, "model inputs prediction_loss_only ignore_keys"),
    "create_optimizer": (Trainer, "model"),
    "_clip_grad_norm": (Trainer, "model"),
    "_get_grad_norm": (Trainer, "model grad_norm"),
    "_get_train_sampler": (GRPOTrainer, "dataset"),
    "log": (GRPOTrainer, "logs start_time"),
    "evaluate": (Trainer, "eval_dataset ignore_keys metric_key_prefix"),
    "_save": (Trainer, "output_dir state_dict"),
    "_load_from_checkpoint": (Trainer, "resume_from_checkpoint model"),
    "_load_best_model": (Trainer, ""),
}

# Attributes that PPOTrainer reads, and the class whose source sets them.
ATTRIBUTES = {
    "_buffered_inputs": GRPOTrainer,
    "_entropy_bonus_enabled": GRPOTrainer,
    "_logs": GRPOTrainer,
    "_metrics": GRPOTrainer,
    "_step": GRPOTrainer,
    "_tokenizer": GRPOTrainer,
    "continuous_batching_config": GRPOTrainer,
    "entropy_coef": GRPOTrainer,
    "eos_token_ids": GRPOTrainer,
    "generation_config": GRPOTrainer,
    "generation_kwargs": GRPOTrainer,
    "num_iterations": GRPOTrainer,
    "pad_to_multiple_of": GRPOTrainer,
    "reward_func_names": GRPOTrainer,
    "reward_weights": GRPOTrainer,
    "temperature": GRPOTrainer,
    "use_transformers_continuous_batching": GRPOTrainer,
    "accelerator": Trainer,
    "args": Trainer,
    "control": Trainer,
    "current_gradient_accumulation_steps": Trainer,
    "model": Trainer,
    "state": Trainer,
}

FUNCTIONS = {
    PeftModel.set_adapter: "self adapter_name inference_mode",
    PeftModel.load_adapter: "self model_id adapter_name is_trainable",
    PeftModel.save_pretrained: "self save_directory safe_serialization selected_adapters",
    PeftModel.add_adapter: "self adapter_name peft_config",
    PeftModel.delete_adapter: "self adapter_name",
    PeftModel.disable_adapter: "self",
    peft.utils.save_and_load.get_peft_model_state_dict: "model state_dict adapter_name unwrap_compiled "
    "save_embedding_layers",
    peft.utils.save_and_load.set_peft_model_state_dict: "model peft_model_state_dict adapter_name",
    peft.utils.save_and_load.load_peft_weights: "model_id device",
    trl.GRPOTrainer._tokenize_prompts: "self prompts",
    trl.trainer.utils.pad: "tensors padding_value padding_side pad_to_multiple_of",
    trl.trainer.utils.selective_log_softmax_and_entropy: "logits index entropy_requires_grad temperature",
    trl.trainer.utils.shuffle_sequence_dict: "seq_dict",  # what they do with lists: tests/test_rollout.py
    trl.trainer.utils.split_tensor_dict: "tensor_dict num_chunks",
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model: "module params_and_buffers_to_ignore",
    PreTrainedModel.enable_input_require_grads: "self",
    PreTrainedModel.get_compiled_call: "self compile_config",  # shadowed, as the next, for CUDA graphs
    GenerationMixin._valid_auto_compile_criteria: "self model_kwargs generation_config",
    ContinuousMixin.init_continuous_batching: "self generation_config continuous_batching_config workload_hints",
    ContinuousBatchingManager.warmup: "self",
    ContinuousBatchingManager.add_requests: "self inputs max_new_tokens",
    ContinuousBatchingManager.start: "self",
    ContinuousBatchingManager.is_running: "self",
    ContinuousBatchingManager.get_result: "self request_id timeout",
    ContinuousBatchingManager.stop: "self block",
    ContinuousBatchingManager.destroy: "self",
    BaseTunerLayer.get_base_layer: "self",
    BaseTunerLayer._cast_input_dtype: "self x dtype",  # shadowed in every LoRA layer
    PreTrainedModel.disable_input_require_grads: "self",
}


def source(thing):
    return textwrap.dedent(inspect.getsource(thing))


def parameters(function):
    return [p.name for p in inspect.signature(function).parameters.values()]


@functools.cache
def attributes_set(cls):
    """The names that a class assigns to `self`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source(cls)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


# ---- names and parameters


@pytest.mark.parametrize("name", METHODS)
def test_an_overridden_method_is_where_it_was_with_its_parameters(name):
    owner, wanted = METHODS[name]
    assert name in vars(owner), f"{owner.__name__} defines no {name} any more: see PPOTrainer.{name}"
    found = parameters(vars(owner)[name])[1:]
    wanted = wanted.split()
    assert found[: len(wanted)] == wanted, f"{owner.__name__}.{name} takes {found}: see PPOTrainer.{name}"


def test_every_method_that_ppo_overrides_is_listed_here():
    assert METHODS.keys() == OVERRIDDEN


@pytest.mark.parametrize("name", sorted(OVERRIDDEN - {"__init__"}))
def test_an_override_takes_as_many_arguments_as_the_original(name):
    original = inspect.signature(getattr(GRPOTrainer, name)).parameters.values()
    required = [p for p in original if p.default is p.empty]
    for given in (required, original):
        assert inspect.signature(getattr(PPOTrainer, name)).bind(*given)  # a TypeError where it takes fewer


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_ppo_reads_is_set_by_the_trainer_above(name):
    owner = ATTRIBUTES[name]
    assert name in attributes_set(owner), f"{owner.__name__} sets no self.{name} any more: see PPOTrainer"


def test_every_attribute_that_ppo_reads_from_the_trainers_above_is_listed_here():
    nodes = [n for n in ast.walk(PPO_CLASS) if isinstance(n, ast.Attribute)]
    mine = [n for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "self"]
    # in `__init__`, what is set there first is PPO's own, but for what super().__init__ has set before
    own = {n.attr for n in mine if isinstance(n.ctx, ast.Store)} - ATTRIBUTES.keys()
    methods = {f.name for f in PPO_CLASS.body if isinstance(f, ast.FunctionDef)}
    read = {n.attr for n in mine} - own - methods - {"_prepare_inputs", "add_callback"}
    assert read == ATTRIBUTES.keys()
    assert parameters(GRPOTrainer._prepare_inputs) == ["self", "generation_batch"]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_a_function_takes_the_parameters_that_are_counted_on(function):
    wanted = FUNCTIONS[function].split()
    assert parameters(function)[: len(wanted)] == wanted


# ---- behaviour that is not in a signature


def test_the_loss_of_grpo_accepts_advantages_by_token():
    text = source(GRPOTrainer._compute_loss)
    conditional = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "advantages.dim() == 1"
    ]
    assert [ast.unparse(s) for node in conditional for s in node.body] == ["advantages = advantages.unsqueeze(1)"]
    assert text.count("advantages.unsqueeze") == 1


def test_the_loss_of_grpo_asks_for_log_probabilities_once_and_by_the_method_that_ppo_overrides():
    assert source(GRPOTrainer._compute_loss).count("self._get_per_token_logps_and_entropies(") == 1


def test_the_dapo_loss_is_a_mean_over_the_tokens_of_the_rollout_batch():
    text = source(GRPOTrainer._compute_loss)
    assert 'inputs["num_items_in_batch"]' in text
    assert "self.current_gradient_accumulation_steps / self.args.steps_per_generation" in text


def test_a_rollout_batch_holds_what_ppo_reads_from_it():
    text = source(GRPOTrainer._generate_and_score_completions)
    for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"):
        assert f'"{key}": ' in text
    for key in ("old_per_token_logps", "ref_per_token_logps"):
        assert f'output["{key}"]' in text
    assert "self._generate(prompts)" in text and "self._calculate_rewards(" in text
    assert 'self._logs["advantages"].extend' in text
    assert '"frac_reward_zero_std"' in text


def test_generate_returns_prompts_and_completions_first():
    returns = [n for n in ast.walk(ast.parse(source(GRPOTrainer._generate))) if isinstance(n, ast.Return)]
    names = [ast.unparse(element) for element in returns[-1].value.elts]
    assert names[:2] == ["prompt_ids", "completion_ids"]
    assert "self._generate_single_turn(" in source(GRPOTrainer._generate)


def test_log_probabilities_come_as_three_values():
    returns = [
        n
        for n in ast.walk(ast.parse(source(GRPOTrainer._get_per_token_logps_and_entropies)))
        if isinstance(n, ast.Return)
    ]
    assert returns and all(len(r.value.elts) == 3 for r in returns)


def test_a_rollout_batch_is_made_every_so_many_micro_steps():
    text = source(GRPOTrainer._prepare_inputs)
    assert "self._step % generate_every == 0" in text
    assert "self.args.steps_per_generation * self.num_iterations" in text
    assert "self._step += 1" in source(GRPOTrainer.training_step)


def test_the_adapter_names_are_those_that_trl_and_peft_know():
    from rlhf_recipes.roles import POLICY, REFERENCE

    assert (POLICY, REFERENCE) == ("default", "ref")
    for trainer in (GRPOTrainer, DPOTrainer):
        assert '"ref"' in source(trainer.__init__), trainer.__name__


def test_reward_trainer_takes_pairs_that_are_tokenized():
    text = source(RewardTrainer._prepare_dataset)
    assert '"chosen_ids" in column_names and "rejected_ids" in column_names' in text
    assert "pad_token_id = processing_class.pad_token_id" in source(RewardTrainer.__init__)


def test_sft_trainer_takes_rows_that_are_tokenized_with_their_labels():
    text = source(SFTTrainer._prepare_dataset)
    assert 'is_processed = "input_ids" in column_names' in text and 'if "labels" not in column_names' in text


def test_dpo_trainer_reads_its_rows_by_the_methods_that_are_overridden():
    """See rlhf_recipes/preferences.py."""
    assert parameters(DPOTrainer._prepare_dataset)[1:] == ["dataset", "processing_class", "args", "dataset_name"]
    assert parameters(DPOTrainer.compute_ref_log_probs)[1:] == ["model", "inputs"]
    for trainer in (DPOTrainer, RewardTrainer):
        assert parameters(trainer.compute_loss)[1:3] == ["model", "inputs"]
    text = source(dpo_trainer.DataCollatorForPreference)
    assert all(f'example["{side}_ids"]' in text for side in ("prompt", "chosen", "rejected"))
    assert 'output["completion_mask"]' in text and "chosen_mask + rejected_mask" in text


def test_trainer_state_is_the_last_file_of_a_checkpoint():
    """Runs tell a complete checkpoint by it."""
    text = source(Trainer._save_checkpoint)
    state = text.index("TRAINER_STATE_NAME")
    assert state > text.index("self.save_model(") and state > text.index("self._save_optimizer_and_scheduler(")
    assert state > text.index("self._save_rng_state(")


def test_a_trainer_looks_whether_to_stop_only_after_a_step_and_says_in_its_checkpoints_that_it_will():
    """Runs replace the epochs of a training that had ended, and tell it by the control in the newest checkpoint."""
    assert "self._run_epoch(" in source(Trainer._inner_training_loop)
    epoch = source(Trainer._run_epoch)
    assert epoch.index("self.training_step(") < epoch.index("self.control.should_training_stop")
    assert "should_training_stop" in TrainerControl().state()["args"]
    assert "self.callback_handler.callbacks + [self.control]" in source(Trainer._save_checkpoint)


def test_log_probabilities_and_entropies_are_those_of_the_tempered_logits():
    torch.manual_seed(0)
    logits, index = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    logps, entropies = trl.trainer.utils.selective_log_softmax_and_entropy(logits, index, False, temperature=2.0)
    wanted = (logits / 2).log_softmax(-1)
    torch.testing.assert_close(logps, wanted.gather(-1, index[..., None])[..., 0])
    torch.testing.assert_close(entropies, -(wanted.exp() * wanted).sum(-1))


def test_pad_pads_on_the_side_that_is_asked_for():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert trl.trainer.utils.pad(rows, 0, padding_side="left").tolist() == [[1, 2, 3], [0, 0, 4]]
    assert trl.trainer.utils.pad(rows, 9, padding_side="right", pad_to_multiple_of=4).tolist() == [
        [1, 2, 3, 9],
        [4, 9, 9, 9],
    ]
