"""Plots as SVG for a page that may be light or dark: text in the page's own font and colour, colours as CSS variables.

matplotlib draws; it is imported when the first plot is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf_recipes.report.palette import COLOURS, FAINT, INK

POINTS = 240
"""Points that a line keeps: more cannot be seen, and make a heavy page."""
SMALL, WIDE = 2.2, 4.2
"""Inches; text is of one size in both. A telephone is as wide as one of the wide ones, or two of the small ones."""


Point = tuple[float, float, float | None]
"""x, y, and half of y's 95% interval where it has one."""


@dataclass(frozen=True)
class Line:
    """Points to be joined."""

    label: str
    hue: str
    points: Sequence[Point]
    dashed: bool = False
    faint: bool = False
    marker: str = ""


@dataclass(frozen=True)
class Mark:
    """A row of a forest plot: mean and 95% interval, and a second such measure of the same."""

    label: str
    hue: str
    mean: float
    low: float
    high: float
    second: tuple[float, float, float] | None = None
    muted: bool = False


def lines(
    name: str,
    drawn: Sequence[Line],
    *,
    x: str,
    y: str,
    small: bool = False,
    diagonal: bool = False,
) -> str:
    """Lines over a common axis, their legend below it; `diagonal` is where both axes agree."""
    width, height = (SMALL, 1.45) if small else (WIDE, 2.6)
    with _figure(name, width, height, margins=small) as (figure, axes, svg):
        for line in drawn:
            points = [line.points[i] for i in _kept(len(line.points))]
            xs, ys, halves = zip(*points, strict=True)
            style: dict[str, Any] = {
                "color": COLOURS[line.hue][0],
                "linestyle": "--" if line.dashed else "-",
                "linewidth": 0.8 if line.faint else 1.4,
                "alpha": 0.4 if line.faint else 1,
                "marker": line.marker or ("o" if len(points) == 1 else None),
                "markersize": 3.2,
                "label": line.label or "_",
            }
            if any(halves):
                axes.errorbar(xs, ys, yerr=[half or 0.0 for half in halves], elinewidth=1, capsize=2, **style)
            else:
                axes.plot(xs, ys, **style)
        if diagonal:
            values = [value for line in drawn for point in line.points for value in point[:2]]
            ends = [min(values), max(values)]
            axes.plot(ends, ends, color=FAINT, linewidth=0.8, linestyle=":", label="_")
        axes.set(xlabel=x, ylabel=y)
        axes.margins(x=0.03)
        _legend(figure, axes, width)
    return svg[0]


def forest(
    name: str, marks: Sequence[Mark], *, x: str, reference: float | None = None, legend: tuple[str, str] | None = None
) -> str:
    """One row a mark: a dot with its interval, and where there is a second measure a hollow diamond below it."""
    height = 0.75 + 0.3 * len(marks) + (0.25 if legend else 0)
    with _figure(name, WIDE, max(height, 1.5)) as (figure, axes, svg):
        for row, mark in enumerate(marks):
            shift = 0.14 if mark.second else 0.0
            pairs = [((mark.mean, mark.low, mark.high), -shift, "o", True)]
            pairs += [(mark.second, shift, "D", False)] if mark.second else []
            for (mean, low, high), offset, marker, filled in pairs:
                colour = FAINT if mark.muted else COLOURS[mark.hue][0]
                axes.errorbar(
                    [mean],
                    [row + offset],
                    xerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
                    color=colour,
                    marker=marker,
                    markersize=5 if filled else 4.2,
                    markerfacecolor=colour if filled else "none",
                    elinewidth=1.4,
                    capsize=2.5,
                )
        if reference is not None:
            axes.axvline(reference, color=FAINT, linewidth=0.9, linestyle="--")
        if legend:
            axes.plot([], [], color=INK, marker="o", linestyle="", markersize=5, label=legend[0])
            axes.plot([], [], color=INK, marker="D", linestyle="", markersize=4.2, mfc="none", label=legend[1])
            _legend(figure, axes, WIDE)
        axes.set_yticks(range(len(marks)), [mark.label for mark in marks])
        axes.set_ylim(len(marks) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.06)
        axes.set_xlabel(x)
    return svg[0]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A running mean over a thirtieth of the points to either side, fewer at the ends; thinned to what is drawn."""
    reach = max(len(points) // 30, 1)
    windows = {i: points[max(i - reach, 0) : i + reach + 1] for i in _kept(len(points))}
    return [(points[i][0], fmean(y for _, y, _ in window), None) for i, window in windows.items()]


def _kept(count: int) -> list[int]:
    """Which of so many points are drawn: about `POINTS` at the most, evenly spread, the last one among them."""
    return sorted({*range(0, count, -(-count // POINTS)), count - 1})


def _legend(figure: Any, axes: Any, width: float) -> None:
    """Below the axes, where it hides no data; none where nothing has a name."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, int(width * 13 // (max(map(len, labels)) + 5)))
        figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)))


@contextmanager
def _figure(name: str, width: float, height: float, *, margins: bool = False) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure with one pair of axes in the report's style; its SVG is in the list when the block ends.

    With `margins`, in inches the same for every figure, the axes of small ones stand below each other; without, they
    are as wide as text and legend leave room for.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,  # the same drawing, the same SVG; and no two drawings share an id
        "font.size": 8.5,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "axes.formatter.limits": (-3, 4),
        "grid.color": FAINT,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.6,
        "legend.columnspacing": 1.2,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        "axes.linewidth": 0.6,
    }
    svg: list[str] = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
        if margins:
            figure.subplots_adjust(0.4 / width, 0.4 / height, 1 - 0.08 / width, 1 - 0.15 / height)
        axes = figure.add_subplot()
        yield figure, axes, svg
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if width == SMALL else 5, steps=[1, 2, 2.5, 5, 10]))
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg.append(_inlined(written.getvalue()))


def _inlined(svg: str) -> str:
    """matplotlib's file as a part of a page: no prologue, no style or size of its own, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' id="(?![mpC][0-9a-f_]{8})[^"]*"', "", svg)  # of groups; markers and clips are referred to
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)
    for name, (light, _) in COLOURS.items():
        svg = svg.replace(light, f"var(--{name})")
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return re.sub(r"\n\s*", " ", svg).strip()
