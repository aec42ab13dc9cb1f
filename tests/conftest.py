"""Small things that many tests share: a tokenizer of 43 words, a tiny Llama, prompts."""

import logging
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the hub fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_configure(config):
    """Tests say what a machine without a GPU does, on every machine; `-m gpu` are those of the GPU."""
    marks = config.option.markexpr or ""
    if "gpu" not in marks or "not gpu" in marks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


WORDS = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(40)]


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def tiny_llama():
    """A function that makes a Llama of 4 layers and 60 thousand random weights, the same ones each time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            initializer_range=0.2,  # at the usual 0.02 every next token is about as likely as any other
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture
def tiny_policy(tiny_llama):
    """A function that puts a LoRA adapter, which is not the zero adapter, on the tiny Llama."""
    from peft import LoraConfig, get_peft_model

    def make(**kwargs):
        return get_peft_model(
            tiny_llama(**kwargs),
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
        )

    return make


@pytest.fixture(scope="session")
def prompts():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [f"w{i} " + f"w{j} " * (j % 3 + 1) for i in range(8) for j in range(8)]})


@pytest.fixture
def chatml():
    """A tokenizer of bytes with the habits of SmolLM2's: pad is EOS, and its template goes on after EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture
def make_reward_adapter(tiny_policy, tmp_path):
    """A function that gives the folder of a reward model: the policy's adapter, its upper layers moved, and a head."""

    import torch

    from rlhf_recipes.roles import POLICY, REWARD, Roles

    def make(seed):
        roles = Roles(tiny_policy(), trunk=0.5)
        roles.add_copy(REWARD, POLICY)
        torch.manual_seed(seed)
        roles.add_head(REWARD, torch.randn(1, 32))
        for parameter in roles.layer_parameters(REWARD, roles.layers[2:]).values():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        roles.save_scalar(REWARD, tmp_path / f"reward{seed}")
        return tmp_path / f"reward{seed}"

    return make


@pytest.fixture(scope="module")
def terminal_left_alone():
    """Recipes set up logs, warnings and bars of the whole process; the tests after such a module get their own back."""
    from transformers.utils import logging as transformers_logging

    root, ours = logging.getLogger(), logging.getLogger("rlhf_recipes")
    handlers, level, environment, show = [*root.handlers], ours.level, dict(os.environ), warnings.showwarning
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)
    warnings.showwarning = show
    os.environ.clear()
    os.environ.update(environment)
    transformers_logging.enable_default_handler()
    transformers_logging.disable_propagation()
