"""Figures for people: numbers with their intervals, durations, and short tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FEW = 20
"""Prompts below which an interval is rough, and is shown with a mark."""


def few(prompts: int) -> str:
    """The mark of an interval over so few prompts that it is rough; empty over more."""
    return f" ({prompts} prompt{'s' * (prompts != 1)})" if prompts < FEW else ""


def number(value: object) -> str:
    """A figure for people: `0.71 ± 0.02` for (mean, half-width), `0.713`, `12,345`; None is a dash, text stays."""
    match value:
        case None:
            return "-"
        case (None, _):  # NaN or infinite, as a file holds it
            return "NaN"
        case (float() | int() as mean, None):  # one observation has no interval
            return number(mean)
        case (float() | int() as mean, float() | int() as half):
            if half != half:
                return number(mean)
            # The interval decides how many decimals are worth showing, of means below 10 two at least.
            places = next((p for p in range(3) if round(half * 10**p) >= 1), 3) if half else 2
            places = max(places, 2) if abs(mean) < 10 else places
            return f"{mean:.{places}f} ± {half:.{places}f}"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float() if value != value:
            return "NaN"
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def duration(seconds: float) -> str:
    """`14 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """A short table: the first column to the left, the others to the right.

    Args:
        rows: one mapping a line, values by column; what is missing or None is shown as a dash.
        columns: which, and in what order; by default all, as they come.

    >>> print(table([{"": "sft", "gold": (0.671, 0.018)}, {"": "ppo", "gold": (0.853, 0.012)}]))
                gold
    sft  0.67 ± 0.02
    ppo  0.85 ± 0.01
    """
    columns = list(columns or dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([number(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells
    )
