"""The evaluation of a run, and how its reward was over-optimized: from what later measurements wrote beside the stages.

Every key of theirs is optional: what is not there is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_recipes.figures import number
from rlhf_recipes.report import plots
from rlhf_recipes.report.content import Block, Plot, Plots, Row, Table, Text
from rlhf_recipes.report.palette import hue, step
from rlhf_recipes.report.reading import Run, finite, interval

MARKERS = "osD^vP"


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
        rates = [_rate(duel.get(key)) for key in ("win_rate", "length_controlled")]
        cells = [str(duel.get("policy", "-")), against, str(duel.get("judge", "-")), *map(_percent, rates)]
        ties = finite(duel.get("ties"))
        cells += ["-" if ties is None else f"{100 * ties:.1f}", number(duel.get("prompts")), number(duel.get("failed"))]
        rows.append(Row(cells, hue(cells[0]), muted=not evidence))
        if rates[0]:
            label = f"{cells[0]}, {cells[2]}" if len({d.get("judge") for d in found}) > 1 else cells[0]
            marks.append(plots.Mark(label, hue(cells[0]), *rates[0], second=rates[1], muted=not evidence))
    columns = ["policy", "against", "judge", "wins, %", "length-controlled, %", "ties, %", "prompts", "failed"]
    note = "In brackets the 95% interval; a tie counts half."
    if any(row.muted for row in rows):
        note += " Grey: by the reward model that PPO itself optimized, which is no evidence that answers got better."
    blocks: list[Block] = [Text("", "Win rates"), Table(columns, rows, left=3, note=note)]
    if marks:
        both = ("all answers", "length-controlled") if any(mark.second for mark in marks) else None
        svg = plots.forest("win-rates", [_hundredfold(mark) for mark in marks], x="wins, %", reference=50, legend=both)
        caption = "Win rates with 95% intervals; the dashed line is a draw"
        blocks.append(Plots([Plot(svg, caption, plots.WIDE)]))
    return blocks


def _rate(value: object) -> tuple[float, float, float] | None:
    """A share with the ends of its interval, as metrics hold it."""
    match value:
        case [mean, low, high] if (known := finite(mean)) is not None:
            ends = [finite(end) for end in (low, high)]
            return known, known if ends[0] is None else ends[0], known if ends[1] is None else ends[1]
    return None


def _percent(rate: tuple[float, float, float] | None) -> str:
    return "-" if rate is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * end for end in rate))


def _hundredfold(mark: plots.Mark) -> plots.Mark:
    second = mark.second and (100 * mark.second[0], 100 * mark.second[1], 100 * mark.second[2])
    return plots.Mark(
        mark.label, mark.hue, 100 * mark.mean, 100 * mark.low, 100 * mark.high, second=second, muted=mark.muted
    )


# ---- best of n


def best_of_n(found: Mapping[str, Any]) -> list[Block]:
    """What the best of n answers of the start scores, beside the policies, which move as far in KL."""
    tried = found.get("best_of_n") or []
    if not tried:
        return []
    measures = [name for name in ("reward", "gold") if any(interval(one.get(name)) for one in tried)]
    rows = [
        Row(
            [
                f"best of {one.get('n', '?')}",
                number(finite(one.get("kl_bound"))),
                *(number(one.get(m)) for m in measures),
            ]
        )
        for one in tried
    ]
    policies = {
        name: {key: interval(values.get(key)) for key in ("KL to SFT", *measures)}
        for name, values in (found.get("policies") or {}).items()
        if hue(name) in ("dpo", "ppo")
    }
    for name, values in policies.items():
        rows.append(Row([name, *(number(values[key]) for key in ("KL to SFT", *measures))], hue(name)))
    drawn = []
    for name in measures:
        points = [
            (at, *value)
            for one in tried
            if (at := finite(one.get("kl_bound"))) is not None and (value := interval(one.get(name)))
        ]
        lines = [plots.Line("best of n", "base", *_columns(points), marker="s")] if points else []
        for policy, values in policies.items():
            at, value = values["KL to SFT"], values[name]
            if at and value:
                lines.append(plots.Line(policy, hue(policy), [at[0]], [value[0]], [value[1]], marker="o"))
        title = {"reward": "Reward", "gold": "Gold score"}[name]
        svg = plots.lines(
            f"best-of-n-{name}", lines, x="KL to SFT, nats per answer (best of n: bound)", y=name, title=title
        )
        drawn.append(Plot(svg, f"{title} of the best of n answers and of the policies, by KL", plots.WIDE))
    note = "The KL of the best of n is at most ln n - (n - 1)/n; that of a policy is measured."
    columns = ["", "KL, nats", *measures]
    return [Text("", "Best of n beside the policies"), Table(columns, rows, note=note), Plots(drawn)]


def _columns(
    points: Sequence[tuple[float, float, float | None]],
) -> tuple[list[float], list[float], list[float | None]]:
    return [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]


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
    points = [
        (x, y, finite(one.get("pairs")) or 0.0)
        for one in found.get("reliability") or []
        if (x := finite(one.get("confidence"))) is not None and (y := finite(one.get("accuracy"))) is not None
    ]
    if points:
        line = plots.Line("", "rm", [x for x, _, _ in points], [y for _, y, _ in points], marker="o")
        titles = {"x": "confidence of the reward model", "y": "share that is right", "title": "Reliability"}
        svg = plots.lines("reliability", [line], **titles, diagonal=True)
        pairs = f", {sum(n for _, _, n in points):,.0f} pairs" if any(n for _, _, n in points) else ""
        drawn.append(Plot(svg, f"Reliability: on the dotted line, confidence is accuracy{pairs}", plots.WIDE))
    marks = []
    for name, values in by_category.items():
        if known := interval(values.get("accuracy")):
            mean, half = known[0], known[1] or 0.0
            marks.append(plots.Mark(name, "rm", mean, mean - half, mean + half))
    if marks:
        svg = plots.forest("categories", marks, x="accuracy", reference=0.5)
        drawn.append(Plot(svg, "Accuracy by category with 95% intervals; the dashed line is chance", plots.WIDE))
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
            cells.append(number((value, 1.96 * error) if error is not None and value is not None else value))
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
    for name, title in (("reward", "Training reward"), ("gold", "Gold score")):
        lines = []
        for index, (beta, path) in enumerate(paths.items()):
            known = [(point["kl"] ** 0.5, point[name]) for point in path if point[name] is not None]
            if known:
                xs, ys = zip(*known, strict=True)
                lines.append(plots.Line(f"beta {beta:g}", step(index, len(betas)), xs, ys, marker=MARKERS[index % 6]))
        if lines:
            svg = plots.lines(
                f"overoptimization-{name}",
                lines,
                x="square root of the KL to SFT, nats per answer",
                y=title.lower(),
                title=title,
            )
            drawn.append(Plot(svg, f"{title} against the square root of the KL, by beta", plots.WIDE))
    rows = []
    for index, (beta, path) in enumerate(paths.items()):
        last = path[-1]
        best = max(
            (point for point in path if point["gold"] is not None), key=lambda point: point["gold"], default=None
        )
        seeds = {point["seed"] for point in points if point["beta"] == beta}
        cells = [f"{beta:g}", number(len(seeds)), *(number(last[key]) for key in ("kl", "reward", "gold"))]
        cells += [number(best["gold"]), number(best["kl"])] if best else ["-", "-"]
        rows.append(Row(cells, step(index, len(betas))))
    columns = ["beta", "seeds", "KL at the end", "reward", "gold", "highest gold", "at KL"]
    text = (
        "The policy moves to the right as it is trained. Where the reward goes on rising and the gold score falls, it "
    )
    text += "has learned to please the reward model instead of being right."
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
