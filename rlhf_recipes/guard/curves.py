"""Over-optimization curves: what guarded trainings at several `beta` measured, as points, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TypedDict

from rlhf_recipes import figures
from rlhf_recipes.runs import disk

POINTS, PICTURE = "metrics.json", "overoptimization.svg"


class CurvePoint(TypedDict):
    """One evaluation of one training."""

    beta: float
    seed: int
    step: int
    kl: float  # nats per completion, to the reference
    reward: float  # what PPO optimizes
    gold: float  # the unseen scorer's


def read(stage: Path, beta: str, seed: int) -> list[CurvePoint]:
    """The points of a finished stage, from the file that its guard left."""
    points = json.loads((stage / "guard.json").read_text())["points"]
    return [
        CurvePoint(beta=float(beta), seed=seed, step=p["step"], kl=p["kl"], reward=p["reward"], gold=p["score"])
        for p in points
    ]


def table(points: Sequence[CurvePoint]) -> str:
    """For each beta where its gold score was best, and where it ended."""
    rows = []
    for beta, curve in _by_beta(points):
        best, last = max(curve, key=lambda point: point["gold"]), curve[-1]
        rows.append(
            {
                "beta": f"{beta:g}",
                "best gold": best["gold"],
                "at KL": best["kl"],
                "reward": best["reward"],
                "gold at the end": last["gold"],
                "KL": last["kl"],
                "reward then": last["reward"],
            }
        )
    return figures.table(rows)


def write(points: Sequence[CurvePoint], folder: Path) -> Path:
    """Write `metrics.json`, {"points": [...]}, and the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    disk.write_json(folder / POINTS, {"points": points})
    _draw(points, folder / PICTURE)
    return folder


def _by_beta(points: Sequence[CurvePoint]) -> list[tuple[float, list[CurvePoint]]]:
    return [(beta, list(curve)) for beta, curve in groupby(points, key=lambda point: point["beta"])]


def _draw(points: Sequence[CurvePoint], file: Path) -> None:
    """Reward and gold score against the KL, on an axis that goes with its root, as in Gao et al. (figure 1)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in ((left, "reward", "training reward"), (right, "gold", "gold score")):
        for beta, curve in _by_beta(points):
            kl = [max(point["kl"], 0.0) for point in curve]
            axes.plot(kl, [point[key] for point in curve], marker=".", label=f"beta {beta:g}")  # type: ignore[literal-required]
        axes.set_xscale("function", functions=(_root, _square))
        axes.set_xlim(left=0)
        axes.set(title=title, xlabel="KL to the SFT policy, nats per answer")
    right.legend()
    figure.savefig(file)


def _root(x):  # type: ignore[no-untyped-def]
    return abs(x) ** 0.5


def _square(x):  # type: ignore[no-untyped-def]
    return x**2
