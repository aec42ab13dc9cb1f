"""A model whose tensors have a shape and no data, and a meter of the memory that passes through it would take."""

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from omegaconf import DictConfig
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers import AutoHfQuantizer

from rlhf_recipes.config import build

SCALES_PER_BLOCK = 256  # bitsandbytes quantizes the scales themselves in blocks of this size


class Meter(TorchDispatchMode):
    """Counts the bytes that live at the same time, by part.

    A storage belongs to the part that is current when it is made, but to `logits` if a tensor of it is as wide as one
    of `wide`.
    """

    def __init__(self, wide: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.wide = wide
        self.part = "activations"
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.before: Counter[str] = Counter()
        self.sizes: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two of three calls: answered here, without another dispatch
            return args[0].fake_device
        if func is torch.ops.bitsandbytes.gemm_4bit.default:  # its stand-in for tensors without data hides the copy
            with self:
                return _gemm_4bit_default_impl(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.count(tensor)
        return out

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        part = "logits" if tensor.ndim > 1 and tensor.shape[-1] in self.wide else self.part
        self.sizes[key] = (part, storage.nbytes())
        self.live[part] += storage.nbytes()
        weakref.finalize(storage, self._freed, key)
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _freed(self, key: int) -> None:
        part, size = self.sizes.pop(key)
        self.live[part] -= size

    def begin(self) -> None:
        """Forget the peak so far, and count what is alive now as there before."""
        self.before = self.live.copy()
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.live.copy()

    def taken(self) -> dict[str, int]:
        """Bytes by part at the peak since `begin`, beyond what was there before."""
        return {part: self.peak[part] - self.before[part] for part in {*self.peak, *self.before}}


@contextmanager
def dry_run(wide: frozenset[int] = frozenset()) -> Iterator[Meter]:
    """Inside, tensors have no data, and what they would take is metered."""
    with FakeTensorMode(), Meter(wide) as meter:
        yield meter


def skeleton(
    cfg: DictConfig, config: PretrainedConfig, dtype: torch.dtype, layers: int | None, *, classifier: bool = False
) -> PeftModel:
    """The base with a new adapter as `rlhf_recipes.models` makes them, on the meta device, cut after some layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = max(config.num_hidden_layers, layers or 0)
    if classifier:
        config.num_labels, config.pad_token_id = 1, config.pad_token_id or 0
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    # every other kernel keeps as much as torch's own, and may not be installed here
    attention = {"attn_implementation": "eager" if cfg.model.attn_implementation == "eager" else "sdpa"}
    with torch.device("meta"):
        base = auto.from_config(config, dtype=dtype, trust_remote_code=cfg.model.trust_remote_code, **attention)
        if layers is not None:
            base.base_model.layers = base.base_model.layers[:layers]
        if cfg.quantization:
            _quantize(base, cfg, dtype)
        base.requires_grad_(False)
        lora = build(LoraConfig, cfg.lora, task_type="SEQ_CLS" if classifier else "CAUSAL_LM")
        if classifier:
            lora.modules_to_save = ["score"]
        return get_peft_model(base, lora)


def _quantize(base: PreTrainedModel, cfg: DictConfig, dtype: torch.dtype) -> None:
    compute = {"bnb_4bit_compute_dtype": dtype} if cfg.quantization.get("load_in_4bit") else {}
    quantizer = AutoHfQuantizer.from_config(build(BitsAndBytesConfig, cfg.quantization, **compute), pre_quantized=False)
    quantizer.preprocess_model(model=base, device_map=None)
    quantizer.postprocess_model(model=base)


def without_data(model: nn.Module) -> nn.Module:
    """Put tensors without data, which still know their device and their dtype, in place of the model's meta tensors.

    To be called inside `dry_run`.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in made:
                        made[id(tensor)] = _tensor_without_data(module, name, tensor)
                    tensors[name] = made[id(tensor)]
    return model


def _tensor_without_data(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    if isinstance(module, Linear4bit) and name == "weight":
        module.support_avx512bf16_for_cpu = False
        data = torch.empty(((tensor.numel() + 1) // 2, 1), dtype=torch.uint8)
        packed = nn.Parameter(data, requires_grad=False)
        packed.quant_state = _quant_state(tensor, module)
        return packed
    if isinstance(module, Linear8bitLt) and name == "weight":
        module.state.CB = torch.empty(tensor.shape, dtype=torch.int8)
        module.state.SCB = torch.empty(len(tensor))
        weight = nn.Parameter(module.state.CB, requires_grad=False)
        weight.CB = weight.SCB = None
        return weight
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _quant_state(weight: Tensor, module: Linear4bit) -> QuantState:
    """What bitsandbytes keeps beside a weight of 4 bits: the scale of each block, itself in 8 bits if double."""
    blocks = -(-weight.numel() // module.weight.blocksize)
    common = {
        "shape": weight.shape,
        "dtype": module.compute_dtype,
        "blocksize": module.weight.blocksize,
        "quant_type": module.weight.quant_type,
        "code": torch.empty(16),
    }
    if not module.weight.compress_statistics:
        return QuantState(absmax=torch.empty(blocks), **common)
    scales = QuantState(
        absmax=torch.empty(-(-blocks // SCALES_PER_BLOCK)),
        code=torch.empty(256),
        blocksize=SCALES_PER_BLOCK,
        dtype=torch.float32,
    )
    return QuantState(absmax=torch.empty(blocks, dtype=torch.uint8), offset=torch.empty(()), state2=scales, **common)
