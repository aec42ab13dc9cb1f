"""A reward that costs nothing."""

from typing import Any


def share(completions: list[str], **_: Any) -> list[float]:
    """Share of the words that have more than five letters."""
    return [sum(len(word) > 5 for word in text.split()) / max(len(text.split()), 1) for text in completions]
