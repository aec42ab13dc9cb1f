"""The evaluation of a run, and how its reward was over-optimized: from what later measurements wrote beside the stages.

Every key of theirs is optional: what is not there is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_recipes.figures import few, number
from rlhf_recipes.report import plots
from rlhf_recipes.report.content import Block, Plot, Plots, Row, Table, Text
from rlhf_recipes.report.palette import hue, step
from rlhf_recipes.report.reading import Run, finite, interval

MARKERS = "osD^vP"
SCORES = {"reward": "Reward", "gold": "Gold score"}


def evaluation(run: Run) -> list[Block]:
    """Win rates, best of n, the reward model, benchmarks."""
    found = run.evaluation
    return [
        *win_rates(found.get("win_rates") or [], found.get("baseline")),
        *best_of_n(found),
        *reward_model(found.get("reward_model") or {}),
        *benchmarks(found.get("benchmarks") or {}),
    ]


# ---- win rates


def win_rates(found: Sequence[Mapping[str, Any]], baseline: object) -> list[Block]:
    """Who wins against whom by which judge; a judge that PPO was trained on is greyed."""
    if not found:
        return []
    marks, rows = [], []
    for duel in found:
        evidence = duel.get("evidence", True)
        against = str(duel.get("baseline", baseline))
        shown = ("win_rate", "length_controlled")
        rates = [_rate(duel.get(key)) for key in shown]
        judge = f"{duel.get('judge', '-')}{'' if evidence else ' (no evidence)'}"
        cells = [str(duel.get("policy", "-")), against, judge, *(_percent(duel.get(key)) for key in shown)]
        ties = finite(duel.get("ties"))
        cells += ["-" if ties is None else f"{100 * ties:.1f}", _percent(duel.get("without_ties"))]
        cells += [number(duel.get("prompts")), number(duel.get("failed"))]
        rows.append(Row(cells, hue(cells[0]), muted=not evidence))
        if rates[0]:
            label = f"{cells[0]}, {duel.get('judge', '-')}" if len({d.get("judge") for d in found}) > 1 else cells[0]
            marks.append(plots.Mark(label, hue(cells[0]), *rates[0], second=rates[1], muted=not evidence))
    columns = ["policy", "against", "judge", "wins, %", "length-controlled, %", "ties, %", "wins without ties, %"]
    columns += ["prompts", "failed"]
    note = "A tie counts as half. In brackets the 95% interval."
    for why in dict.fromkeys(why for duel in found if (why := duel.get("not_controlled"))):
        note += f" No length-controlled rate where {why}."
    if any(row.muted for row in rows):
        note += " No evidence (grey): PPO was trained to please this judge, so its wins do not show better answers."
    blocks: list[Block] = [Text("", "Win rates"), Table(columns, rows, left=3, note=note)]
    if marks:
        both = ("all answers", "length-controlled") if any(mark.second for mark in marks) else None
        svg = plots.forest("win-rates", [_hundredfold(mark) for mark in marks], x="wins, %", reference=50, legend=both)
        blocks.append(Plots([Plot(svg, "Win rates", "With 95% intervals; the dashed line is a draw.")]))
    return blocks


def _rate(value: object) -> tuple[float, float, float] | None:
    """A share with the ends of its interval, as metrics hold it; of one prompt, which has none, they are the share."""
    match value:
        case [mean, low, high, *_] if (known := finite(mean)) is not None:
            ends = [finite(end) for end in (low, high)]
            return known, known if ends[0] is None else ends[0], known if ends[1] is None else ends[1]
    return None


def _percent(value: Any) -> str:
    rate = _rate(value)
    if rate is None:
        return "-"
    ends = " ({:.1f} to {:.1f})".format(*(100 * end for end in rate[1:])) if value[1] is not None else ""
    return f"{100 * rate[0]:.1f}{ends}{few(value[3]) if len(value) > 3 else ''}"


def _hundredfold(mark: plots.Mark) -> plots.Mark:
    second = mark.second and (100 * mark.second[0], 100 * mark.second[1], 100 * mark.second[2])
    return plots.Mark(
        mark.label, mark.hue, 100 * mark.mean, 100 * mark.low, 100 * mark.high, second=second, muted=mark.muted
    )


# ---- best of n


def best_of_n(found: Mapping[str, Any]) -> list[Block]:
    """What the best of n answers scores, beside the trained policies: the same improvement by search, and its KL."""
    tried = found.get("best_of_n") or []
    scores = [name for name in SCORES if any(interval(one.get(name)) for one in tried)]
    if not scores:
        return []
    rows = [
        Row([f"best of {one.get('n', '?')}", fixed(one.get("kl_bound")), *(number(one.get(score)) for score in scores)])
        for one in tried
    ]
    policies = {name: values for name, values in (found.get("policies") or {}).items() if hue(name) in ("dpo", "ppo")}
    for name, values in policies.items():
        rows.append(Row([name, *(number(values.get(key)) for key in ("KL to SFT", *scores))], hue(name)))
    drawn = []
    for score in scores:
        lines = []
        if points := [point for one in tried if (point := _point(one.get("kl_bound"), one.get(score)))]:
            lines.append(plots.Line("best of n", "base", points, marker="s"))
        for name, values in policies.items():
            moved = interval(values.get("KL to SFT"))
            if moved and (point := _point(moved[0], values.get(score))):
                lines.append(plots.Line(name, hue(name), [point], marker="o"))
        svg = plots.lines(f"best-of-n-{score}", lines, x="KL to SFT, nats per answer", y=score)
        drawn.append(Plot(svg, f"{SCORES[score]} by KL", "With 95% intervals; the KL of the best of n is its bound."))
    note = "The KL of the best of n is at most ln n - (n - 1)/n; that of a policy is measured."
    heading = Text("", "Best of n beside the policies")
    return [heading, Table(["", "KL, nats", *scores], rows, note=note), Plots(drawn)]


def _point(x: object, y: object) -> plots.Point | None:
    """Where a mean lies, and half of its interval."""
    at, value = finite(x), interval(y)
    return None if at is None or value is None else (at, *value)


# ---- the reward model


def reward_model(found: Mapping[str, Any]) -> list[Block]:
    """How often the reward model is right, whether its certainty can be believed, and about what."""
    if not found:
        return []
    bias = found.get("length_bias") or {}
    rows = {
        "accuracy on held-out pairs": number(found.get("accuracy")),
        "calibration error": number(finite(found.get("calibration_error"))),
        "accuracy, length bias": f"{number(bias.get('accuracy'))} ({number(bias.get('pairs'))} pairs)" if bias else "-",
    }
    table = Table(["reward model", ""], [Row([k, v], "rm") for k, v in rows.items() if v != "-"])
    blocks: list[Block] = [Text("", "Reward model"), *([table] if table.rows else [])]
    by_category = found.get("categories") or {}
    drawn = []
    bins = found.get("reliability") or []
    points = [point for one in bins if (point := _point(one.get("confidence"), [one.get("accuracy"), None]))]
    if points:
        line = plots.Line("", "rm", points, marker="o")
        svg = plots.lines("reliability", [line], x="confidence", y="share in the right order", diagonal=True)
        pairs = sum(finite(one.get("pairs")) or 0 for one in bins)
        counted = f" {pairs:,.0f} pairs." if pairs else ""
        drawn.append(Plot(svg, "Reliability", f"On the dotted line, confidence is accuracy.{counted}"))
    marks = []
    for name, values in by_category.items():
        if known := interval(values.get("accuracy")):
            mean, half = known[0], known[1] or 0.0
            marks.append(plots.Mark(name, "rm", mean, mean - half, mean + half))
    if marks:
        svg = plots.forest("categories", marks, x="accuracy", reference=0.5)
        drawn.append(Plot(svg, "Accuracy by category", "With 95% intervals; the dashed line is chance."))
    if by_category:
        cells = [[name, number(v.get("accuracy")), number(v.get("pairs"))] for name, v in by_category.items()]
        blocks.append(Table(["category", "accuracy", "pairs"], [Row(line, "rm") for line in cells]))
    return [*blocks, *([Plots(drawn)] if drawn else [])] if len(blocks) > 1 or drawn else []


# ---- benchmarks


def benchmarks(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[Block]:
    """Tasks and their metrics in lines, policies in columns; a standard error becomes half of a 95% interval."""
    lines = list(
        dict.fromkeys(
            (task, metric)
            for tasks in found.values()
            for task, metrics in tasks.items()
            for metric, value in metrics.items()
            if "_stderr" not in metric and finite(value) is not None
        )
    )
    rows = []
    for task, metric in lines:
        cells = []
        for tasks in found.values():
            values = tasks.get(task, {})
            base, comma, kind = metric.partition(",")
            error = finite(values.get(f"{base}_stderr{comma}{kind}"))
            value = finite(values.get(metric))
            cells.append(number((value, 1.96 * error)) if error and value is not None else fixed(value, 3))
        rows.append(Row([task, metric, *cells]))
    return [Text("", "Benchmarks"), Table(["task", "metric", *found], rows, left=2)] if rows else []


# ---- over-optimization


def overoptimization(run: Run) -> list[Block]:
    """The reward that was trained on and the gold score against the KL, a line for each beta: means over seeds."""
    points = [
        {key: finite(point.get(key)) for key in ("beta", "seed", "step", "kl", "reward", "gold")}
        for point in run.overoptimization
    ]
    points = [point for point in points if point["kl"] is not None and point["kl"] >= 0]
    betas = sorted({point["beta"] for point in points if point["beta"] is not None}, reverse=True)
    if not betas:
        return []
    paths = {beta: _path([point for point in points if point["beta"] == beta]) for beta in betas}
    drawn = []
    for score, title in SCORES.items():
        lines = []
        for index, (beta, path) in enumerate(paths.items()):
            known = [(point["kl"] ** 0.5, point[score], None) for point in path if point[score] is not None]
            if known:
                colour, marker = step(index, len(betas)), MARKERS[index % len(MARKERS)]
                lines.append(plots.Line(f"beta {beta:g}", colour, known, marker=marker))
        if lines:
            svg = plots.lines(f"overoptimization-{score}", lines, x="square root of the KL to SFT in nats", y=score)
            drawn.append(Plot(svg, title, "By the distance from where the policy began; means over seeds."))
    rows = []
    for index, (beta, path) in enumerate(paths.items()):
        last, rated = path[-1], [point for point in path if point["gold"] is not None]
        best = max(rated, key=lambda point: point["gold"], default={})
        seeds = {point["seed"] for point in points if point["beta"] == beta}
        cells = [f"{beta:g}", number(len(seeds)), *(fixed(last[key]) for key in ("kl", "reward", "gold"))]
        rows.append(Row([*cells, fixed(best.get("gold")), fixed(best.get("kl"))], step(index, len(betas))))
    columns = ["beta", "seeds", "KL at the end", "reward", "gold", "highest gold", "at KL"]
    text = "The policy moves to the right as it is trained. Where the reward goes on rising and the gold score falls, "
    text += "it has learned to please the reward model instead of being right."
    return [Text(text), *([Plots(drawn)] if drawn else []), Table(columns, rows, note="Means over seeds.")]


def _path(points: Sequence[dict[str, float | None]]) -> list[dict[str, Any]]:
    """The means over seeds, step by step."""
    path = []
    for at in sorted({point["step"] or 0.0 for point in points}):
        here = [point for point in points if (point["step"] or 0.0) == at]
        means = {}
        for key in ("kl", "reward", "gold"):
            known = [value for point in here if (value := point[key]) is not None]
            means[key] = fmean(known) if known else None
        path.append(means)
    return path


def fixed(value: object, places: int = 2) -> str:
    """A number with as many decimals as the others of its column; a dash for none."""
    known = finite(value)
    return "-" if known is None else f"{known:,.{places}f}"
