"""A GPU that is not there, for recipes to run on: `python -m tests.pretend_gpu recipes.ppo experiment=smoke ...`.

Its tensors say `pretend:0` and hold their data in CPU tensors. Whatever CUDA refuses is refused: an operation on tensors
of both devices (but for numbers, indices and copies), and `numpy()`. So code that forgets where a tensor lies fails here
as it would on a card. Autocast lowers matrix products as on CUDA. Memory, kernels and bitsandbytes are not pretended.

Source of the mechanism: a Python backend for PyTorch's PrivateUse1 device (torch.utils.backend_registration).
"""

import runpy
import sys

import torch
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
LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")


class Module(backend_registration._DummyBackendModule):
    """What `torch.pretend` can do."""

    __name__ = f"torch.{NAME}"

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_):
        return torch.get_rng_state()

    def set_rng_state(self, state, *_):
        """Nothing: the CPU's state is set by itself."""


class Pretended(torch.Tensor):
    """A tensor on the device, around the CPU tensor `held` with its data."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout, device=torch.device(NAME, 0))
        tensor.held = held.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return on_cpu(operation, *args, **(kwargs or {}))

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.held = other.held

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return Pretended(parts["held"])


def on_cpu(operation, *args, **kwargs):
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
    made = tree_map_only(torch.Tensor, Pretended, made)
    return return_and_correct_aliasing(operation, args, kwargs, made) if here else made


def check_devices(operation, args, kwargs, here):
    """Refuse what CUDA refuses."""
    far = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not isinstance(x, Pretended)]
    far = [x for x in far if x.dim()]  # a number may lie anywhere
    if operation in COPIES or not here or not far:
        return
    if operation in INDEXES and isinstance(args[0], Pretended) and not any(x is value for x in far for value in args[2:]):
        return
    shapes = [[tuple(x.shape) for x in tensors] for tensors in (here, far)]
    raise RuntimeError(f"{operation} on two devices: tensors {shapes[0]} on {NAME}, {shapes[1]} on cpu")


def autocast(name):
    """Lower a matrix product's arguments under autocast."""
    operation = getattr(aten, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def lowered(*args, **kwargs):
        dtype = torch.get_autocast_dtype(NAME)
        given = tree_map_only(Pretended, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operation(*given[0], **given[1])

    return lowered


class MadeOnCpuFirst(TorchFunctionMode):
    """`torch.tensor(..., device=...)` does not come by the dispatcher."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in (torch.tensor, torch.as_tensor):
            return function(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


def register():
    """Make the device known to torch, and let the libraries take it for the machine's accelerator."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(on_cpu, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in LOWERED:
        some.impl(name, autocast(name), "AutocastPrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.Tensor.pin_memory = lambda self, *_: self
    MadeOnCpuFirst().__enter__()
    choose()
    return every, some  # which take everything back when they are let go


def choose():
    """Have accelerate, transformers and the recipes choose the device, as they choose a GPU where there is one."""
    import accelerate
    from transformers import training_args

    from rlhf_recipes import models

    device, precision = torch.device(NAME, 0), models.precision
    begin, chosen = accelerate.PartialState.__init__, training_args.TrainingArguments.device.fget

    def begun(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.device = device

    accelerate.PartialState.__init__ = begun
    training_args.TrainingArguments.device = property(lambda self: (chosen(self), device)[1])
    training_args.is_torch_bf16_gpu_available = lambda: True
    models.precision = lambda cfg: precision(cfg) | {"use_cpu": False}


if __name__ == "__main__":
    libraries = register()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
