"""The one error class that a recipe shows as a plain message instead of a traceback."""


class UserError(ValueError):
    """Something a user can mend: the message says what was seen, what is allowed, and what to type next."""
