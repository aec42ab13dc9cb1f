"""Room for Python's own call stack, so that a deep loop does not pay for the depth that it happens to run at.

CPython keeps the frames of calls in chunks of 16 KiB, and returns a chunk to the system when the last frame in it ends.
Where a loop sits just below the end of a chunk, every call that it makes maps memory and unmaps it again: a training
step of Trainer, accelerate, PEFT and torch is as deep as that. Sampling took a third longer for it (docs/memory.md).
CPython keeps a chunk since a patch of 3.13 and 3.14 (python/cpython issue 142183); 3.11 and 3.12 never will.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SLOTS = 72 * 1024
"""Of 8 bytes: more than half of a MiB, so that the chunk is one of 1 MiB and the calls below have the rest of it.
No page of it is touched that no call uses."""


def roomy(function: Callable[P, T]) -> Callable[P, T]:
    """The function, with all calls that it makes in one chunk of the stack."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=SLOTS)
    return functools.wraps(function)(call)
