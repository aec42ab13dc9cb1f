"""How much goes through the model at once where nothing is trained, so that such a pass does not set a run's peak.

Nothing of these passes is kept but the cache of `generate`: in portions they take less memory and as much time.
"""

TOKENS = {"cpu": 1024, "cuda": 2048}
"""Of a pass, by device: enough to keep it busy (on a GPU an estimate)."""
LOGITS = 2**26
"""Of a pass that needs them: 256 MB in float32."""


def tokens_at_once(device: str) -> int:
    """Tokens of a pass on a type of device."""
    return TOKENS.get(device, TOKENS["cuda"])


def prefill_chunk(rows: int, longest: int, device: str) -> int | None:
    """Tokens of each of `rows` prompts that `generate` reads at once, its `prefill_chunk_size`; None for all of it."""
    chunk = max(tokens_at_once(device) // rows, 1)
    return chunk if chunk < longest else None


def rows_at_once(most: int, tokens: int, device: str, logits: int = 1) -> int:
    """How many rows of `tokens` tokens, each with `logits` logits in all, go through together: 1 to `most`."""
    return max(min(most, tokens_at_once(device) // tokens, LOGITS // max(logits, 1)), 1)
