"""The errors that a recipe shows as a plain message instead of a traceback."""


class UserError(ValueError):
    """Something a user can mend: the message says what was seen, what is allowed, and what to type next."""


class OutOfMemory(UserError):
    """The GPU's memory is too small even for one sequence at a time."""


def first_sentence(error: BaseException) -> str:
    """Of what an error says, without its full stop: CUDA's own errors go on for a paragraph."""
    return str(error).partition(". ")[0]
