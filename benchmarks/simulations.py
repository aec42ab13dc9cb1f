"""What the intervals and the guard promise, held against simulated truths: writes results/simulations.md.

    python -m benchmarks.simulations

The library's own functions decide; only the data are made up. A policy's score of a prompt is a truth, plus an effect
of that policy on that prompt, which all samples share, plus the noise of each sample. A few minutes on one core.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import NormalDist
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, stdtrit

from benchmarks.turns import RESULTS
from rlhf_recipes import evaluation
from rlhf_recipes.comparison import wins
from rlhf_recipes.evaluation import Rate
from rlhf_recipes.guard.turning import History, Point

Array = NDArray[Any]
TRAININGS, COMPARISONS, RESAMPLES = 1000, 2000, 400
NOISE = 0.25  # standard deviation of a score over the samples of one prompt
TURN = 5  # the look after which the score falls
Z = NormalDist().inv_cdf(0.975)


def main() -> None:
    """Simulate, and write the tables."""
    (RESULTS / "simulations.md").write_text("\n".join(report()) + "\n")


def report() -> Iterator[str]:
    """The lines of the results."""
    yield from ["# Intervals and guard, simulated", ""]
    yield f"`python -m benchmarks.simulations`, numpy {np.__version__}, scipy {scipy.__version__}; seeded, on the CPU."
    for section in (false_alarms, power, unpaid, best_of_looks, rates, single_samples, means, equal_length):
        yield from ["", *section(np.random.default_rng(0))]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A table in Markdown; fractions with three decimals."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


# ---- the guard


def looks_at(rng: np.random.Generator, truth: Array, prompts: int, samples: int, effect: float, keeps: float) -> Array:
    """Scores by look and prompt (looks, prompts).

    Args:
        truth: (looks,) the mean over all prompts there are.
        effect: standard deviation of what a policy does to a prompt.
        keeps: correlation of these effects between two looks: the policy of one grows out of that of the other.
    """
    effects = rng.normal(0, effect, (len(truth), prompts))
    for look in range(1, len(truth)):
        effects[look] = keeps * effects[look - 1] + (1 - keeps**2) ** 0.5 * effects[look]
    hard = rng.normal(0, 0.3, prompts)
    return truth[:, None] + hard + effects + rng.normal(0, NOISE / samples**0.5, effects.shape)


def guarded(scores: Array, tolerance: float = 0.0, objective: Array | None = None, reward: Array | None = None) -> str:
    """What a training is told: `stops`, `warns`, or nothing."""
    history, told = History(len(scores), tolerance), ""
    for look, of in enumerate(scores.tolist()):
        optimized = float(look) if reward is None else float(reward[look])
        paid = None if objective is None else float(objective[look])
        turn = history.add(Point(look, float(look), optimized, float(np.mean(of)), paid), of)
        if turn is not None:
            told = "stops" if turn.stops else "warns"
        if told == "stops":
            break
    return told


def false_alarms(rng: np.random.Generator) -> Iterator[str]:
    """How often the guard fires where nothing falls."""
    yield from ["## Guard: false alarms", ""]
    yield (
        "The truth is flat and the training reward rises at each look; the tolerance is 0. Fraction of "
        f"{TRAININGS:,} trainings that are warned of: at most .05 is promised. `effect` is the standard "
        "deviation of a policy's effect on a prompt, `keeps` its correlation between two looks."
    )
    rows: list[list[object]] = []
    cases = [(8, 5, 2), (8, 21, 2), (20, 21, 2), (100, 21, 2), (192, 5, 4), (192, 21, 4), (192, 41, 16)]
    for prompts, looks, samples in cases:
        row: list[object] = [prompts, samples, looks]
        for effect, keeps in ((0.0, 0.0), *product((0.1, 0.2, 0.3), (0.0, 0.8))):
            found = [guarded(looks_at(rng, np.zeros(looks), prompts, samples, effect, keeps)) for _ in range(TRAININGS)]
            row.append(sum(map(bool, found)) / TRAININGS)
        rows.append(row)
    columns = [f"effect {effect}, keeps {keeps}" for effect, keeps in product((0.1, 0.2, 0.3), (0, 0.8))]
    yield from ["", *table(["prompts", "samples", "looks", "no effect", *columns], rows)]


def power(rng: np.random.Generator) -> Iterator[str]:
    """How often a fall of a tenth is seen."""
    yield from ["## Guard: power", ""]
    yield (
        f"The truth falls by .1 after look {TURN} of 21, at once or within 8 looks, and stays there; the "
        f"tolerance is 0. Fraction of {TRAININGS // 2:,} trainings that are warned of."
    )
    rows: list[list[object]] = []
    for prompts, samples, within in product((100, 192), (2, 4, 16), (1, 8)):
        truth: Array = -0.1 * np.clip((np.arange(21) - TURN) / within, 0, 1)
        row: list[object] = [prompts, samples, "at once" if within == 1 else f"within {within} looks"]
        for effect, keeps in product((0.1, 0.2, 0.3), (0.0, 0.8)):
            found = [guarded(looks_at(rng, truth, prompts, samples, effect, keeps)) for _ in range(TRAININGS // 2)]
            row.append(sum(map(bool, found)) / len(found))
        rows.append(row)
    columns = [f"effect {effect}, keeps {keeps}" for effect, keeps in product((0.1, 0.2, 0.3), (0, 0.8))]
    yield from ["", *table(["prompts", "samples", "falls", *columns], rows)]


def unpaid(rng: np.random.Generator) -> Iterator[str]:
    """What the guard says while the score collapses, and the reward does not pay for its KL."""
    yield from ["## Guard: a collapse that the objective does not pay for", ""]
    yield (
        f"The truth falls by .3 from look {TURN} to look 15 while the reward rises by .03 (noise .02) and the "
        f"KL by half a nat a look, so that reward - beta x KL falls too. Fractions of {TRAININGS // 2:,} "
        "trainings; 192 prompts, 4 samples, effect .16, keeps .8."
    )
    rows: list[list[object]] = []
    for beta in (0.0, 0.05, 0.1, 0.25):
        told = []
        for _ in range(TRAININGS // 2):
            begun = np.clip(np.arange(16) - TURN, 0, 10)
            reward = 0.003 * begun + rng.normal(0, 0.02, 16)
            objective = reward - beta * 0.5 * np.arange(16)
            told.append(guarded(looks_at(rng, np.asarray(-0.03 * begun), 192, 4, 0.16, 0.8), 0.0, objective, reward))
        rows.append([beta, *(told.count(word) / len(told) for word in ("warns", "stops", ""))])
    yield from ["", *table(["beta", "warned without stopping", "stopped", "nothing said"], rows)]


def best_of_looks(rng: np.random.Generator) -> Iterator[str]:
    """How much the score by which a checkpoint was chosen flatters it."""
    yield from ["## The best of n looks", ""]
    yield (
        "The truth is flat: by how much the best score of all looks lies above it, beside half of the 95% "
        "interval of one look. Effects keep .8."
    )
    rows: list[list[object]] = []
    for (prompts, samples, looks), effect in product(
        ((100, 1, 11), (192, 1, 5), (100, 2, 21), (192, 16, 41)), (0.1, 0.3)
    ):
        best, half = [], []
        for _ in range(TRAININGS // 2):
            scores = looks_at(rng, np.zeros(looks), prompts, samples, effect, 0.8)
            scores = scores - scores.mean(axis=0)  # how hard a prompt is would move all looks together
            best.append(scores.mean(axis=1).max())
            half.append(evaluation.interval(scores[0].tolist()).half_width)
        rows.append([prompts, samples, looks, effect, float(np.mean(best)), float(np.mean(half))])
    yield from ["", *table(["prompts", "samples", "looks", "effect", "best above the truth", "half interval"], rows)]


# ---- intervals


def verdicts(
    rng: np.random.Generator, prompts: int, samples: int, rate: float, alike: float, ties: float
) -> tuple[Array, float]:
    """Comparisons (comparisons, prompts, samples), and the true win rate.

    Args:
        alike: correlation of two samples of a prompt.
        ties: fraction of them.
    """
    shape = COMPARISONS, prompts, 1
    chance = rng.beta(rate * (1 / alike - 1), (1 - rate) * (1 / alike - 1), shape) if alike else np.full(shape, rate)
    won = (rng.random((COMPARISONS, prompts, samples)) < chance).astype(float)
    won[rng.random(won.shape) < ties] = 0.5
    return won, ties / 2 + (1 - ties) * rate


def wilson(mean: Array, effective: Array | float, z: float) -> tuple[Array, Array]:
    """Ends of Wilson's interval for so many independent prompts."""
    middle, scale = mean + z**2 / (2 * effective), 1 + z**2 / effective
    half = z * np.sqrt(mean * (1 - mean) / effective + z**2 / (4 * effective**2))
    return (middle - half) / scale, (middle + half) / scale


def tried(won: Array) -> dict[str, tuple[Array, Array]]:
    """The ends by every method that was tried, ours first."""
    samples = won.shape[2]
    ours = [wins.win_rate(of.ravel().tolist(), samples) for of in won]
    stage = [evaluation.summarize({"EOS": of.ravel().tolist()}, samples)["EOS"] for of in won]
    y = won.mean(axis=2)
    n, mean = y.shape[1], y.mean(axis=1)
    error, coin = y.std(axis=1, ddof=1) / n**0.5, mean * (1 - mean) / n
    share = np.clip(np.divide(error**2, coin, out=np.ones_like(mean), where=coin > 0), 1e-9, 1)
    t = float(stdtrit(n - 1, 0.975))
    drawn = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
    bootstrap = np.quantile(y @ drawn.T, [0.025, 0.975], axis=1)
    wins_of, losses_of = mean * n / share + 0.5, (1 - mean) * n / share + 0.5
    jeffreys = betaincinv(wins_of, losses_of, 0.025), betaincinv(wins_of, losses_of, 0.975)
    return {
        "ours": (np.array([rate.low for rate in ours if rate]), np.array([rate.high for rate in ours if rate])),
        "ours as ±": (np.array([of.mean - of.half_width for of in stage]), np.array([sum(of) for of in stage])),
        "bootstrap": (bootstrap[0], bootstrap[1]),
        "t": (mean - t * error, mean + t * error),
        "Wilson, prompts": wilson(mean, float(n), Z),
        "Wilson, effective": wilson(mean, n / share, Z),
        "Wilson, effective, t": wilson(mean, n / share, t),
        "Jeffreys, effective": (np.where(mean > 0, jeffreys[0], 0), np.where(mean < 1, jeffreys[1], 1)),
    }


def covered(ends: tuple[Array, Array], truth: float) -> float:
    """How often the truth lies within."""
    return float(((ends[0] <= truth + 1e-9) & (ends[1] >= truth - 1e-9)).mean())


def rates(rng: np.random.Generator) -> Iterator[str]:
    """Coverage of win rates and of the rates of stage tables."""
    yield from ["## Rates: coverage of 95% intervals", ""]
    yield (
        f"{COMPARISONS:,} comparisons each. `alike` is the correlation of samples of one prompt. `ours` is "
        "what `make eval` shows; `ours as ±` the rates of stage tables, whose half width is the longer side "
        "of the same interval. The others were tried: a percentile bootstrap over prompts (which `make eval` "
        "had), Student's t on prompts, Wilson for so many prompts, and Wilson and Jeffreys for as many "
        "prompts as vary as much, Wilson also with t."
    )
    rows: list[list[object]] = []
    cases = [(1, 0.0, 0.0), *product((2, 4), (0.0, 0.2, 0.5), (0.0,)), (8, 0.2, 0.0), (1, 0.0, 0.5), (2, 0.2, 0.3)]
    for prompts, rate, (samples, alike, ties) in product((8, 16, 192), (0.5, 0.9), cases):
        won, truth = verdicts(rng, prompts, samples, rate, alike, ties)
        found = tried(won)
        rows.append([prompts, rate, samples, alike, ties, *(covered(ends, truth) for ends in found.values())])
    yield from ["", *table(["prompts", "rate", "samples", "alike", "ties", *found], rows), ""]
    chosen = np.array([row[5:] for row in rows if int(str(row[0])) < 20], dtype=float)
    summary = {"lowest": chosen.min(0), "mean": chosen.mean(0), "highest": chosen.max(0)}
    summary["from .93 to .97"] = ((chosen >= 0.93) & (chosen <= 0.97)).mean(0)
    yield from table(["8 and 16 prompts", *found], [[key, *map(float, of)] for key, of in summary.items()])


def single_samples(rng: np.random.Generator) -> Iterator[str]:
    """Exact coverage for one sample of each prompt, which can take few values."""
    yield from ["## Rates of one sample: exact coverage", ""]
    yield (
        "With one sample a prompt wins are whole numbers, and coverage moves in steps: `next` is that of the "
        "next wider interval."
    )
    rows: list[list[object]] = []
    for prompts, rate in product((8, 16, 64, 192), (0.5, 0.9)):
        found = [wins.win_rate([1.0] * k + [0.0] * (prompts - k), 1) or Rate(0, 0, 0, 0) for k in range(prompts + 1)]
        chance = scipy.stats.binom.pmf(np.arange(prompts + 1), prompts, rate)
        held = np.array([of.low <= rate <= of.high for of in found])
        missed = np.flatnonzero(~held)
        sides = [side for side in (missed[missed < rate * prompts][-1:], missed[missed > rate * prompts][:1])]
        steps = [float(chance[side].sum()) for side in sides]
        next_one = sum(steps) if rate == 0.5 else min(step for step in steps if step)
        rows.append([prompts, rate, float(chance[held].sum()), float(chance[held].sum()) + next_one])
    yield from ["", *table(["prompts", "rate", "coverage", "next"], rows)]


def means(rng: np.random.Generator) -> Iterator[str]:
    """Coverage of the intervals of other measures."""
    yield from ["## Means: coverage of 95% intervals", ""]
    yield (
        "Normal values, one a prompt, as rewards, lengths and changes are. The second column is what was shown before."
    )
    rows: list[list[object]] = []
    for prompts in (2, 4, 8, 16, 64):
        values = rng.normal(size=(5 * COMPARISONS, prompts))
        found = [evaluation.interval(of) for of in values.tolist()]
        before = 1.96 * values.std(axis=1, ddof=1) / prompts**0.5
        rows.append([prompts, float(np.mean([abs(mean) <= half for mean, half in found]))])
        rows[-1].append(float((abs(values.mean(axis=1)) <= before).mean()))
    yield from ["", *table(["prompts", "ours", "1.96 standard errors"], rows)]


# ---- equal length


def equal_length(rng: np.random.Generator) -> Iterator[str]:
    """What is said at equal length of a judge that sees length alone."""
    yield from ["## Win rates at equal length", ""]
    yield (
        "A judge that sees length alone: P(win) = sigmoid(.05 x difference), so that the truth at equal "
        "length is .5. Answers are longer by so much, with this standard deviation; 200 comparisons each."
    )
    rows: list[list[object]] = []
    for (prompts, samples), (extra, spread) in product(
        ((20, 1), (48, 1), (192, 4)), ((100, 10), (40, 10), (20, 10), (16, 10), (10, 10), (0, 10), (60, 40), (20, 60))
    ):
        raw, controlled = [], []
        for _ in range(200):
            longer = rng.normal(extra, spread, prompts * samples)
            won = (rng.random(len(longer)) < expit(0.05 * longer)).tolist()
            raw.append((wins.win_rate(won, samples) or Rate(0, 0, 0, 0)).mean)
            controlled.append(wins.length_controlled(won, longer.tolist(), samples))
        known = [rate for rate in controlled if rate is not None]
        shown = _shown(known, lambda rate: rate.mean), _shown(known, lambda rate: rate.low <= 0.5 <= rate.high)
        width = _shown(known, lambda rate: rate.high - rate.low)
        dashes = 1 - len(known) / len(controlled)
        rows.append([prompts, samples, f"{extra} ± {spread}", float(np.mean(raw)), dashes, *shown, width])
    columns = ["prompts", "samples", "longer by", "wins", "a dash", "at equal length", "coverage of .5", "width"]
    yield from ["", *table(columns, rows)]


def _shown(known: Sequence[Rate], figure: Callable[[Rate], float]) -> object:
    return float(np.mean([figure(rate) for rate in known])) if len(known) >= 20 else "-"


if __name__ == "__main__":
    main()
