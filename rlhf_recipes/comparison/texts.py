"""What can be counted in answers as they stand: repetition, diversity and refusals."""

import re
from collections.abc import Iterable, Sequence

REFUSALS = re.compile(
    r"\bI(?:'m| am) (?:sorry|unable|not able)\b"
    r"|\bI (?:can(?:'t|not| not)|could not|couldn't|won't|will not|must decline|do not feel comfortable)\b"
    r"|\bas an? (?:AI|language model)\b"
    r"|\b(?:it|that) would be wrong\b",
    re.IGNORECASE,
)
"""Phrases by which English answers decline. A rough count: what declines in other words is missed."""


def words(text: str) -> list[str]:
    """Lower-case words; punctuation does not count."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n tokens."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Iterable[str], n: int) -> float:
    """Share of the n-grams of all texts that are different ones; 0 where there are none.

    Source: Li et al. (arXiv 1510.03055), with n-grams for tokens in the denominator, so that 1 is reached. It falls as
    there are more texts: compare equal numbers of them.
    """
    found = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(found)) / len(found) if found else 0.0


def self_repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that it holds already; 0 where it is too short.

    Source: seq-rep-n of Welleck et al. (arXiv 1908.04319), equation 8.
    """
    found = ngrams(words(text), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def refuses(text: str) -> bool:
    """Whether an answer declines, by the phrases above."""
    return REFUSALS.search(text.replace("\u2019", "'")) is not None
