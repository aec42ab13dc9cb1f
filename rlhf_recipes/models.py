"""The base model, its tokenizer and its adapters, loaded as a stage's config says."""

import gc
import hashlib
import json
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from jinja2 import TemplateError
from omegaconf import DictConfig
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from rlhf_recipes import machine, world
from rlhf_recipes.config import build
from rlhf_recipes.data.formats import end_with_the_turn, is_conversational
from rlhf_recipes.errors import UserError
from rlhf_recipes.roles import POLICY, REWARD, Roles, keep_as_packed, on_a_causal_model, read_adapter_config
from rlhf_recipes.runs import disk

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize + ': ' + message.content }}"
    "{{ eos_token if message.role == 'assistant' }}{{ '\\n\\n' }}{% endfor %}"
    "{{ 'Assistant:' if add_generation_prompt }}"
)
"""Given to a tokenizer that has no chat template where the data are conversations: plain text, no new tokens."""


def source(model: DictConfig) -> str:
    """Hub id or folder that `model.name_or_path` stands for."""
    return str(world.BASE) if model.name_or_path == EMBEDDED else str(model.name_or_path)


def with_model(cfg: DictConfig, name: str) -> DictConfig:
    """The config with another model in the place of the run's, under its own revision, chat template and tokens."""
    other = cfg.copy()
    other.model.name_or_path = name
    for key in ("revision", "chat_template", "pad_token", "eos_token"):
        other.model[key] = None
    return other


def weights_mark(model: DictConfig) -> str:
    """What identifies a model's weights before they are loaded: its files in a folder, or its commit on the hub.

    Raises:
        UserError: there is no such folder or hub id.
    """
    folder = Path(source(model))
    if folder.is_dir():
        return disk.fingerprint_weights(folder)
    read_config(model)  # now it is in the cache, under the commit that its revision stands for
    file = try_to_load_from_cache(str(folder), "config.json", revision=model.revision)
    return f"{folder}@{Path(file).parent.name if isinstance(file, str) else model.revision}"


def dtype(model: DictConfig) -> torch.dtype:
    """`model.dtype`, or for `auto` `machine.best_dtype`.

    Raises:
        UserError: no such dtype.
    """
    if model.dtype == "auto":
        return machine.best_dtype()
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if model.dtype not in names:
        raise UserError(f"model.dtype={model.dtype}: allowed are auto, {', '.join(names)}")
    return names[model.dtype]


def precision(cfg: DictConfig) -> dict[str, Any]:
    """The training arguments that go with the dtype of the base: mixed precision, and the device."""
    base = dtype(cfg.model)
    return {
        "bf16": base == torch.bfloat16,
        "fp16": base == torch.float16,
        "use_cpu": machine.device().type == "cpu",
    }


def load_tokenizer(model: DictConfig, rows: Dataset) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token, an EOS token, and a chat template where the rows are conversations.

    Its EOS is the token that ends an answer there: what the chat template writes after one, where rows are
    conversations. It is learned, scored and stopped at by it. Padding is another token, where there is one.

    Raises:
        UserError: there is no EOS token and none is set, a token that is set is not in the vocabulary, or not the one
            that the chat template ends an answer with.
    """
    with loading(model):
        tokenizer = AutoTokenizer.from_pretrained(
            source(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    faults = []
    for name in ("eos_token", "pad_token"):
        token = model[name]
        if token is not None and token not in tokenizer.get_vocab():
            faults.append(f"model.{name}={token!r} is not in the vocabulary of {model.name_or_path}")
        elif token is not None:
            setattr(tokenizer, name, token)
    if model.chat_template is not None:
        file = Path(model.chat_template)
        is_file = file.suffix in (".jinja", ".j2")
        if is_file and not file.is_file():
            raise UserError(f"model.chat_template={file}: no such file")
        tokenizer.chat_template = file.read_text() if is_file else model.chat_template
    try:
        turn = end_with_the_turn(tokenizer, rows[0])
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"the chat template of {model.name_or_path} cannot write a question and its answer ({error}): set "
            "model.chat_template=<a Jinja file>"
        ) from error
    if turn and model.eos_token is not None:
        faults.append(
            f"model.eos_token={model.eos_token!r}, but the chat template of {model.name_or_path} ends an answer with "
            f"{turn!r}, and no completion would end: leave model.eos_token out, or set model.chat_template"
        )
    elif turn:
        logger.info("%s: answers end with %s, as its chat template writes them", model.name_or_path, turn)
    if tokenizer.eos_token is None and not faults:
        faults.append(
            f"the tokenizer of {model.name_or_path} has no EOS token: name one of its tokens by model.eos_token=..."
        )
    if faults:
        raise UserError("; ".join(faults))
    conversational = any(is_conversational(rows[0].get(key)) for key in ("prompt", "messages"))
    if conversational and tokenizer.chat_template is None:
        logger.warning(
            "%s has no chat template: conversations are written as plain text, `User: ...` and `Assistant: ...` "
            "(set model.chat_template for another)",
            model.name_or_path,
        )
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = model.pad_token or unused_token(tokenizer) or tokenizer.eos_token
    if tokenizer.pad_token == tokenizer.eos_token:
        logger.warning(
            "%s: the padding token is the one that ends an answer (%s), so a reward model cannot see whether an answer "
            "ends (model.pad_token=<another token of the vocabulary>)",
            model.name_or_path,
            tokenizer.eos_token,
        )
    return tokenizer


def unused_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that stands in no text, for padding: one that is meant for it, a reserved one, or any other."""
    written = f"{tokenizer.chat_template} {tokenizer.bos_token} {tokenizer.eos_token}"
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [token for token in special if token not in written]
    return next((token for word in ("pad", "reserved", "unused", "") for token in free if word in token), None)


@contextmanager
def loading(model: DictConfig) -> Iterator[None]:
    """What transformers says of a model that cannot be loaded, as a plain message."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(" ".join(str(error).split()), 600)
        raise UserError(
            f"model.name_or_path={model.name_or_path} cannot be loaded: {reason} Want a hub id, a folder with a "
            "config.json, or `embedded`; a gated model needs HF_TOKEN."
        ) from error


def read_config(model: DictConfig) -> PretrainedConfig:
    """The base's own config, from its folder or the hub.

    Raises:
        UserError: there is no such folder or hub id.
    """
    with loading(model):
        return AutoConfig.from_pretrained(
            source(model), revision=model.revision, trust_remote_code=model.trust_remote_code
        )


def load_base(cfg: DictConfig, *, classifier: bool = False) -> PreTrainedModel:
    """The base model, quantized as the config says, frozen; a `classifier` has a scalar head for the LM head."""
    gc.collect()  # a base that was let go is still in cycles with its trainer: two would be in memory
    common: dict[str, Any] = {"revision": cfg.model.revision, "trust_remote_code": cfg.model.trust_remote_code}
    config = read_config(cfg.model)
    if cfg.model.attn_implementation is not None:
        common["attn_implementation"] = cfg.model.attn_implementation
    if cfg.quantization:
        compute = {"bnb_4bit_compute_dtype": dtype(cfg.model)} if cfg.quantization.get("load_in_4bit") else {}
        common["quantization_config"] = build(BitsAndBytesConfig, cfg.quantization, **compute)
        common["device_map"] = {"": machine.device()}
    if dtype(cfg.model) == torch.bfloat16 and machine.device().type == "cpu" and not machine.multiplies_bf16():
        logger.warning(
            "this CPU has no bf16 instructions, and multiplies bf16 matrices many times slower than float32 ones "
            "(model.dtype=float32 is faster, at twice the memory)"
        )
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if classifier:
        config.num_labels = 1
        set_seed(cfg.seed)  # the head starts at random
    model = auto.from_pretrained(source(cfg.model), config=config, dtype=dtype(cfg.model), **common)
    if not cfg.quantization:
        model.to(machine.device())  # a trainer would do so too, but some models have none: those of samples and of eval
    keep_as_packed(model)
    return model.requires_grad_(False)


def load_policy(cfg: DictConfig, adapter: Path | None) -> PeftModel:
    """The base with a stage's adapter as `default`; without one, with a new adapter that does nothing yet.

    It comes frozen: TRL's trainers cast what is trainable to bf16 on a quantized base. `Roles.train` thaws it.

    Raises:
        UserError: the adapter was made for another base.
    """
    if adapter is not None:
        read_adapter_config(adapter)
    base = load_base(cfg)
    if adapter is None:
        return new_adapter(base, cfg).requires_grad_(False)
    try:
        return PeftModel.from_pretrained(base, adapter)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"the adapter in {adapter} was made for another base than {cfg.model.name_or_path}: {reason}"
        ) from error


def new_adapter(base: PreTrainedModel, cfg: DictConfig) -> PeftModel:
    """A LoRA adapter as the config says. Equal seeds give equal tensors in every stage, so that they can be shared.

    Raises:
        UserError: one of several target modules is not in the model, which PEFT would pass over.
    """
    config = build(LoraConfig, cfg.lora, task_type="CAUSAL_LM")
    modules = {name.rpartition(".")[2]: module for name, module in base.named_modules()}
    wanted = config.target_modules if isinstance(config.target_modules, set) else ()
    if missing := sorted(name for name in wanted if name.rpartition(".")[2] not in modules):
        linear = ", ".join(sorted(name for name, module in modules.items() if isinstance(module, torch.nn.Linear)))
        raise UserError(f"lora.target_modules: the model has no {', '.join(missing)}; its linear layers are {linear}")
    set_seed(cfg.seed)
    return get_peft_model(base, config)


def load_reward_model(cfg: DictConfig, adapter: Path | None) -> PeftModel:
    """A sequence classifier whose adapter starts from the SFT adapter's tensors, with a new scalar head.

    PEFT refuses to load a causal LM's adapter on a classifier, so the tensors are put in by hand.
    """
    config = build(LoraConfig, cfg.lora) if adapter is None else read_adapter_config(adapter)
    base = load_base(cfg, classifier=True)
    kept = set(config.modules_to_save or ()) - {"lm_head"}  # a classifier has none
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score", *sorted(kept)], False
    set_seed(cfg.seed)
    model = get_peft_model(base, config)
    if adapter is not None:
        Roles(model, trunk=0).load(POLICY, adapter)
    return model.requires_grad_(False)


def load_classifier(cfg: DictConfig, name: str) -> PreTrainedModel:
    """A sequence classifier of one label, by its folder or hub id, as a reward model of its own."""
    other = with_model(cfg, name).model
    with loading(other):
        classifier = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype(other), num_labels=1)
    return classifier.eval().to(machine.device())


def load_scorer(cfg: DictConfig, adapter: Path) -> Roles:
    """The base with a reward model as the role `reward`.

    Raises:
        UserError: the adapter has no scalar head, or was made for another base.
    """
    config = on_a_causal_model(read_adapter_config(adapter))
    roles = Roles(get_peft_model(load_base(cfg), config), trunk=0)
    roles.hold(REWARD, [adapter])
    roles.model.eval()
    return roles


def thaw(model: PeftModel, trunk: float, frozen_top: float = 0.0) -> Roles:
    """After TRL's constructor: train the adapter above the trunk, in float32, without gradients below it."""
    roles = Roles(model, trunk, frozen_top)
    roles.train(POLICY)
    if roles.frozen_layers:
        keep_gradients_off_inputs(model)
    return roles


def keep_gradients_off_inputs(model: PeftModel) -> None:
    """Let frozen lower layers be passed without a trace: no backward pass through them, no checkpoint of them.

    For checkpointing, transformers lets the embeddings' output require gradients, again at each start of a Trainer.
    Only the reentrant kind needs it.
    """
    model.disable_input_require_grads()
    model.get_base_model().enable_input_require_grads = lambda: None


def fingerprint(model: PreTrainedModel) -> str:
    """What identifies a base whatever its dtype and quantization: its shape, and the signs of some embeddings."""
    config = model.config.get_text_config()
    shape = [config.model_type, config.hidden_size, config.num_hidden_layers, config.vocab_size]
    embeddings = model.get_input_embeddings().weight.detach()
    rows = torch.linspace(0, len(embeddings) - 1, 64, device=embeddings.device).long()
    signs = (embeddings[rows] > 0).cpu().numpy().tobytes()
    return hashlib.sha256(json.dumps(shape).encode() + signs).hexdigest()[:16]
