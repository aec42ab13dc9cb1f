"""A GPU that is not there, for recipes to run on: `python -m benchmarks.pretend_gpu recipes.ppo experiment=smoke ...`.

Its tensors say `pretend:0` and hold their data in CPU tensors. What CUDA refuses is refused: an operation on tensors of
both devices (but for numbers, indices and copies), and `numpy()`. So code that forgets where a tensor lies fails here
as it would on a card; and a model that was left on the CPU is not run. Autocast lowers matrix products as on CUDA, and
attention keeps no weights. Time is not pretended, nor are bitsandbytes' kernels: its own for CPUs do the work.

With `--count` before the recipe, the last line of the output is the peak of what lived on the device, in bytes: what
torch would have allocated on a card, but for what kernels take while they run and for the allocator's fragments. With
`--memory <bytes>` the device has no more than that, and what does not fit raises torch.OutOfMemoryError.

Source of the mechanism: a Python backend for PyTorch's PrivateUse1 device (torch.utils.backend_registration).
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import inf
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretend"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXES = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default),
    aten._index_put_impl_.default,
}
LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")
FUSED = ("silu_backward",)  # has a kernel on CPU and CUDA, and takes steps on an unknown device


class Module(backend_registration._DummyBackendModule):
    """What `torch.pretend` can do."""

    __name__ = f"torch.{NAME}"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Of autocast."""
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        """The CPU's, which draws for the device."""
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        """Nothing: the CPU's state is set by itself."""


class Pretended(Tensor):
    """A tensor on the device, around the CPU tensor `held` with its data."""

    held: Tensor
    made: Callable[[Tensor], None] | None = None  # is called with each new one

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=torch.device(NAME, 0))
        tensor.held = held.detach()
        if cls.made:
            cls.made(tensor)
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_cpu(operation, *args, **(kwargs or {}))

    @property
    def data(self) -> Tensor:
        """As of every tensor; to set it is to take another's data."""
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: "Pretended") -> None:
        Tensor.data.__set__(self, other)
        self.held = other.held

    def tolist(self) -> Any:
        """Numbers."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """Where the data lies."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Where the data lies."""
        return self.held.untyped_storage()

    def __deepcopy__(self, _: Any) -> Tensor:
        copied = Pretended(self.held.clone())
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> "Pretended":
        return Pretended(parts["held"])


class Pretended4bit(Params4bit, Pretended):
    """A quantized weight on the device, of one that was quantized on the CPU."""

    @staticmethod
    def __new__(cls, weight: Params4bit) -> "Pretended4bit":
        moved = Pretended.__new__(cls, weight.data.as_subclass(Tensor))
        moved.plain = Pretended(moved.held)  # what its views are views of
        moved.__dict__.update({name: value for name, value in vars(weight).items() if name != "data"})
        moved.quant_state.to(NAME)
        return moved


def on_cpu(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the held tensors; what it makes is on the device where its arguments are, or where it is told."""
    here = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Pretended)]
    check_devices(operation, args, kwargs, here)
    device = kwargs.get("device")
    own = (args, kwargs if device is None else kwargs | {"device": torch.device("cpu")})
    held_args, held_kwargs = tree_map_only(Pretended, lambda x: x.held, own)
    made = operation(*held_args, **held_kwargs)
    if operation is aten.copy_.default:
        return args[0]
    if operation is aten._to_copy.default and made is held_args[0]:
        made = made.clone()
    if torch.device(device).type != NAME if device is not None else not here:
        return made
    made = tree_map_only(Tensor, Pretended, made)
    if not here:
        return made
    args = tree_map_only(Pretended4bit, lambda x: x.plain, args)
    return return_and_correct_aliasing(operation, args, kwargs, made)


def check_devices(operation: Any, args: Any, kwargs: Any, here: list[Pretended]) -> None:
    """Refuse what CUDA refuses.

    Raises:
        RuntimeError: tensors lie on two devices.
    """
    far = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not isinstance(x, Pretended)]
    far = [x for x in far if x.dim()]  # a number may lie anywhere
    if operation in COPIES or not here or not far:
        return
    if (
        operation in INDEXES
        and isinstance(args[0], Pretended)
        and not any(x is value for x in far for value in args[2:])
    ):
        return
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (here, far)]
    raise RuntimeError(f"{operation} on two devices: tensors {shapes[0]} on {NAME}, {shapes[1]} on cpu")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The fused kernel of CPUs, which is as sparing as those of CUDA; an unknown device gets attention in steps."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.size(-3) // x.size(-3), -3) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    fused = aten._scaled_dot_product_flash_attention_for_cpu.default
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def autocast(operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose arguments are lowered under autocast."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        given = tree_map_only(Pretended, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*given[0], **given[1])

    return lowered


class MadeOnCpuFirst(TorchFunctionMode):
    """What does not come by the dispatcher: `torch.tensor(..., device=...)`, and lists as indices."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = function(*args, **kwargs)
            return made if device is None else made.to(device)
        if function is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(torch.tensor(x) if isinstance(x, list) else x for x in args[1]))
        return function(*args, **kwargs)


def register() -> list[torch.library.Library]:
    """Make the device known to torch, and let the libraries take it for the machine's accelerator.

    Returns:
        What takes the device back from torch when it is let go.
    """
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(on_cpu, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOWERED:
        some.impl(name, autocast(getattr(aten, name).default), "AutocastPrivateUse1")
    for name in FUSED:
        some.impl(name, partial(on_cpu, getattr(aten, name).default), "PrivateUse1")
    some.impl("scaled_dot_product_attention", autocast(attention), "AutocastPrivateUse1")
    for key in ("AutogradPrivateUse1", "PrivateUse1"):
        some.impl("scaled_dot_product_attention", attention, key)
    torch.__future__.set_swap_module_params_on_conversion(True)
    Tensor.pin_memory = lambda self, *_: self
    MadeOnCpuFirst().__enter__()
    choose()
    return [every, some]


def choose() -> None:
    """Have accelerate, transformers and the recipes choose the device, as they choose a GPU where there is one."""
    import accelerate
    from transformers import PreTrainedModel, training_args
    from trl.trainer import utils

    from rlhf_recipes import machine

    device = torch.device(NAME, 0)
    begin, chosen = accelerate.PartialState.__init__, training_args.TrainingArguments.device.fget
    load = PreTrainedModel.from_pretrained.__func__

    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.device = device

    def loaded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") != {"": device}:
            return load(cls, *args, **kwargs)
        return moved(load(cls, *args, **kwargs | {"device_map": {"": "cpu"}}))

    accelerate.PartialState.__init__ = begun
    training_args.TrainingArguments.device = property(lambda self: (chosen(self), device)[1])
    training_args.is_torch_bf16_gpu_available = lambda: True
    PreTrainedModel.from_pretrained = classmethod(loaded)
    machine.device = lambda: device
    machine.card = lambda: machine.Card("pretended GPU", (8, 9), 80 * machine.GB, 79 * machine.GB)
    utils._use_triton = lambda _: True  # where Triton runs, TRL's LM head scores no other tokens than those of the loss

    def refuse_cpu(module: nn.Module, _: Any) -> None:
        if not isinstance(module, PreTrainedModel) or module.device.type != "cpu":
            return
        if not any(isinstance(weight, FakeTensor) for weight in module.parameters()):  # those of a plan
            raise RuntimeError("a model was left on the CPU, where its passes would be slow")

    nn.modules.module.register_module_forward_pre_hook(refuse_cpu)


def moved(model: Any) -> Any:
    """A model on the device that bitsandbytes quantized, which has no other way there."""
    model.hf_device_map = {"": torch.device(NAME, 0)}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, Params4bit):
                module._parameters[name] = Pretended4bit(weight)
            elif weight is not None:
                module._parameters[name] = nn.Parameter(weight.to(NAME), requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(NAME)
    model.tie_weights()
    return model


class Memory:
    """Of the device: a meter of what lives there, and a limit."""

    def __init__(self, limit: float = inf) -> None:
        from trl.kernels import chunked_logprob

        from rlhf_recipes.plan.dry_run import Meter
        from rlhf_recipes.plan.passes import IN_PLACE

        self.meter, self.limit = Meter(), limit
        Pretended.made = self.take
        for name in IN_PLACE:
            setattr(chunked_logprob, name, self.uncounted()(getattr(chunked_logprob, name)))

    def take(self, tensor: Tensor) -> None:
        """Count a tensor.

        Raises:
            torch.OutOfMemoryError: it was too much.
        """
        self.meter.count(tensor)
        if self.meter.live.total() > self.limit:
            raise torch.OutOfMemoryError(f"Tried to allocate {tensor.nbytes} bytes. The pretended GPU has {self.limit}")

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, new tensors are not counted."""
        Pretended.made = None
        yield
        Pretended.made = self.take


def main() -> None:
    """Run a recipe on the device."""
    parser = argparse.ArgumentParser("python -m benchmarks.pretend_gpu")
    parser.add_argument("--count", action="store_true", help="tell the peak of the device's memory, in bytes")
    parser.add_argument("--memory", type=int, default=inf, help="that the device has, in bytes (default: all it takes)")
    parser.add_argument("recipe", help="recipes.sft, recipes.ppo, ...")
    chosen, overrides = parser.parse_known_args()
    libraries = register()
    memory = Memory(chosen.memory)
    sys.argv = [chosen.recipe, *overrides]
    runpy.run_module(chosen.recipe, run_name="__main__", alter_sys=True)
    if chosen.count:
        print(memory.meter.peak.total())
    del libraries


if __name__ == "__main__":
    main()
