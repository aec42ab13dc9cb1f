"""The shape of a base model: its config, without its weights, and for the presets without the hub."""

from typing import Any

from omegaconf import DictConfig
from transformers import AutoConfig, PretrainedConfig

from rlhf_recipes.models import read_config

QWEN = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True}
SMOL = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}


def _shape(
    family: dict[str, Any], hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return family | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


# What memory depends on, of the config.json of each model in conf/model/.
PRESETS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _shape(SMOL, 576, 1536, 30, 9, 3),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _shape(SMOL, 960, 2560, 32, 15, 5),
    "Qwen/Qwen2.5-0.5B": _shape(QWEN, 896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B": _shape(QWEN, 1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B": _shape(QWEN, 2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B": _shape(QWEN, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "meta-llama/Llama-3.2-1B-Instruct": _shape(LLAMA, 2048, 8192, 16, 32, 8, head_dim=64),
    "meta-llama/Llama-3.2-3B-Instruct": _shape(LLAMA, 3072, 8192, 28, 24, 8, head_dim=128),
    "meta-llama/Llama-3.1-8B-Instruct": _shape(LLAMA, 4096, 14336, 32, 32, 8, tie_word_embeddings=False),
}


def model_config(model: DictConfig) -> PretrainedConfig:
    """The base's config: of a preset from the table above, else from the folder or the hub.

    Raises:
        UserError: there is no such folder or hub id.
    """
    if model.name_or_path in PRESETS and model.revision is None:
        return AutoConfig.for_model(**PRESETS[model.name_or_path])
    return read_config(model)
