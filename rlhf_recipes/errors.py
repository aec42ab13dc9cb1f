"""The errors that a recipe shows as a plain message instead of a traceback."""

import sys

FULL = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
"""What torch, CUDA's runtime, cuBLAS and cuDNN, Triton and the CPU's allocator say where memory has run out."""


class UserError(ValueError):
    """Something a user can mend: the message says what was seen, what is allowed, and what to type next."""


class OutOfMemory(UserError):
    """The GPU's memory is too small even for one sequence at a time."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: of the GPU by whichever library noticed first, or the CPU's.

    A kernel that wants more shared memory than the GPU has (Triton's OutOfResources) is none of them: fewer rows do not
    help there.
    """
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def first_sentence(error: BaseException) -> str:
    """Of what an error says, without its full stop: CUDA's own errors go on for a paragraph."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
