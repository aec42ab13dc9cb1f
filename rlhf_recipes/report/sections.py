"""A run said in tables, plots and words: one function for each section, which gives no blocks where it has nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.figures import FEW, duration, few, number
from rlhf_recipes.report import plots
from rlhf_recipes.report.content import (
    Block,
    Commands,
    Lineage,
    Node,
    Plot,
    Plots,
    Row,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from rlhf_recipes.report.curves import curves
from rlhf_recipes.report.examples import samples
from rlhf_recipes.report.judged import evaluation, overoptimization
from rlhf_recipes.report.palette import hue
from rlhf_recipes.report.reading import EVALUATION, OVEROPTIMIZATION, Interval, Run, Trained, intervals
from rlhf_recipes.runs import disk
from rlhf_recipes.runs.card import command
from rlhf_recipes.runs.manifest import flat

MEASURES = {
    "gold": "gold score",
    "reward": "reward",
    "KL to SFT": "KL to SFT, nats",
    "length": "length, tokens",
    "EOS": "EOS, share",
}
"""Measures to be seen first, and how they are called here."""


@dataclass(frozen=True)
class Report:
    """A run, said: what it is, the sections about it, and what could not be read."""

    run: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    faults: Sequence[str]


def report(run: Run) -> Report:
    """The report of a run. A section whose files are not of the known form becomes a fault, which names them."""
    parts: tuple[tuple[str, str, Callable[[Run], Sequence[Block]]], ...] = (
        ("Results", "<stage>/metrics.json or eval/metrics.json", results),
        ("Where it comes from", "<stage>/manifest.json", lineage),
        ("Training", "<stage>/log.jsonl or <stage>/checkpoints/*/trainer_state.json", curves),
        ("Evaluation", f"{EVALUATION}/metrics.json", lambda run: [*measures(run), *evaluation(run)]),
        ("Over-optimization", f"{OVEROPTIMIZATION}/metrics.json", overoptimization),
        ("Sample completions", f"{EVALUATION}/samples.json or <stage>/samples.json", samples),
        ("Time and memory", "<stage>/manifest.json", costs),
        ("Make it again", "<stage>/manifest.json", commands),
    )
    sections, faults = [], [*run.faults]
    for title, files, blocks_of in parts:
        try:
            blocks = blocks_of(run)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            faults.append(f"{title} is left out: {files} in {run.path} is not of the known form ({error!r}).")
            continue
        if blocks:
            sections.append(Section(title, blocks))
    for stage in run.stages:
        if stage.state != "finished":
            faults.append(f"{stage.name} is {stage.state}: what is shown of it goes up to its newest checkpoint.")
    last = run.finished[-1].manifest
    facts = {
        "base": base(run),
        "date": f"{moment(max(str(stage.manifest['finished']) for stage in run.finished))} UTC",
        "device": str(last.get("device", "")),
        "stages": ", ".join(stage.name for stage in run.stages),
    }
    return Report(run.name, [(key, value) for key, value in facts.items() if value], sections, faults)


# ---- results


def results(run: Run) -> list[Block]:
    """How good each policy is, the last one's figures first."""
    found = policies(run)
    if not found:
        return []
    shown = [name for name in ("gold", "reward", "KL to SFT", "length") if any(name in m for m in found.values())]
    blocks: list[Block] = [*tiles(run)]
    note = "± is half of the 95% interval of the mean over held-out prompts."
    prompts = run.evaluation.get("prompts") or {}
    if run.evaluation.get("policies") and prompts.get("count"):
        note += f" Evaluated on {prompts['count']:,} prompts, {prompts.get('samples', 1)} completions each"
        rest = [name for name in found if name not in run.evaluation["policies"]]
        note += f"; {', '.join(rest)} as measured at the end of the stage." if rest else "."
    asked = prompts.get("count") or min((len(stage.samples) for stage in run.finished if stage.samples), default=FEW)
    note += f" Rough intervals{few(asked)}." if few(asked) else ""
    for stage in run.finished:
        if "kept" in stage.metrics and stage.name in found:
            note += f" {stage.name} is the {stage.metrics['kept']} at held-out data, which flatters it there a little."
    blocks.append(measured(found, shown or [*dict.fromkeys(k for m in found.values() for k in m)], note))
    drawn = [name for name in ("gold", "reward") if sum(name in m for m in found.values()) > 1]
    return [*blocks, *([Plots([_by_policy(name, found) for name in drawn])] if drawn else [])]


def policies(run: Run) -> dict[str, dict[str, Interval]]:
    """The measures of each policy: those of the evaluation, and else those of the last stage that measured it."""
    found: dict[str, dict[str, Interval]] = {}
    for stage in run.finished:
        if stage.stage in TRAINING:
            for policy, values in stage.policies().items():
                found[policy] = found.get(policy, {}) | values
    found |= {policy: intervals(values) for policy, values in (run.evaluation.get("policies") or {}).items()}
    order = ["base", *TRAINING]
    return dict(sorted(found.items(), key=lambda item: order.index(hue(item[0])) if hue(item[0]) in order else 9))


def tiles(run: Run) -> list[Tiles]:
    """The last policy of the run beside the one it began as, and what changed prompt by prompt.

    Where the evaluation measured them, its figures stand here as in the table, and the stage's change does not go
    with them.
    """
    changed = [stage for stage in run.finished if "/" not in stage.name and stage.metrics.get("change")]
    if not changed:
        return []
    last, found = changed[-1], policies(run)
    start, evaluated = next(iter(last.policies())), run.evaluation.get("policies") or {}
    change = {} if last.name in evaluated or start in evaluated else intervals(last.metrics["change"])
    made = []
    for name, label in MEASURES.items():
        if name == "EOS" or name not in found[last.name] or name not in found[start]:
            continue
        value, was = (number(found[policy][name]).partition(" ")[0] for policy in (last.name, start))
        note = f"{start} {was}"
        if name in change:
            note += f", {'+' if change[name][0] >= 0 else ''}{number(change[name])}"
        if name != "KL to SFT":
            made.append(Tile(f"{last.name}: {label}", value, note))
        elif start == "sft":  # what it is a divergence from
            made.append(Tile(f"{last.name}: KL to SFT", value, "nats per answer"))
    return [Tiles(made, hue(last.name))] if made else []


def measured(found: Mapping[str, Mapping[str, Interval]], shown: Sequence[str], note: str = "") -> Table:
    """A table of measures by policy."""
    rows = [Row([name, *(number(values.get(k)) for k in shown)], hue(name)) for name, values in found.items()]
    return Table(["policy", *(MEASURES.get(name, name) for name in shown)], rows, note=note)


def measures(run: Run) -> list[Block]:
    """Everything that was measured of the policies."""
    found = policies(run)
    shown = list(dict.fromkeys(name for values in found.values() for name in values))
    shown.sort(key=lambda name: [*MEASURES].index(name) if name in MEASURES else len(MEASURES))
    return [Text("", "Measures by policy"), measured(found, shown)] if set(shown) - {*MEASURES} else []


def _by_policy(name: str, found: Mapping[str, Mapping[str, Interval]]) -> Plot:
    marks = []
    for policy, values in found.items():
        if name in values:
            mean, half = values[name]
            marks.append(plots.Mark(policy, hue(policy), mean, mean - (half or 0), mean + (half or 0)))
    title, caption = f"{MEASURES[name].capitalize()} by policy", "On held-out prompts, with 95% intervals."
    return Plot(plots.forest(f"by-policy-{name}", marks, x=MEASURES[name]), title, caption)


# ---- where it comes from


def lineage(run: Run) -> list[Block]:
    """The stages as a tree, and the versions that made them."""
    config = run.finished[-1].manifest.get("config", {})
    known = [("fingerprint", str(mark)) for mark in {s.manifest.get("base"): 0 for s in run.stages} if mark]
    revision = config.get("model", {}).get("revision")
    root = Node(base(run), "base", "base", [*known, *([("revision", str(revision))] if revision else [])])
    nodes: dict[str, Node] = {}
    for stage in run.stages:
        before = [*stage.manifest.get("predecessors", {})]
        parent = next((nodes[name] for name in reversed(before) if name in nodes), root)
        nodes[stage.name] = Node(stage.name, hue(stage.name), stage.state, _facts(stage), _warnings(run, stage))
        parent.children.append(nodes[stage.name])
    return [Lineage(root), *versions(run)]


def _facts(stage: Trained) -> list[tuple[str, str]]:
    manifest = stage.manifest
    figures = {k: v for k, v in stage.metrics.items() if isinstance(v, int | float) or (v and isinstance(v, list))}
    figures |= {"kept": stage.metrics["kept"]} if "kept" in stage.metrics else {}
    sources = {str(v): 0 for k, v in flat(manifest.get("data", {})).items() if k.endswith(("path", "name")) and v}
    memory = ", ".join(f"{mb:,} MB {kind}" for kind, mb in manifest.get("peak_memory", {}).items())
    facts = {
        "figures": ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in figures.items()),
        "weights": manifest.get("fingerprint", ""),
        "made from": ", ".join(f"{name} {mark}" for name, mark in manifest.get("predecessors", {}).items()),
        "data": f"{', '.join(sources)} {disk.hash_value(manifest.get('data'))}",
        "seed": str(manifest.get("seed", "")),
        "time": duration(manifest["seconds"]) if stage.state == "finished" else "",
        "peak memory": memory,
        "device": str(manifest.get("device", "")),
    }
    return [(key, str(value).strip()) for key, value in facts.items() if value]


def _warnings(run: Run, stage: Trained) -> list[str]:
    """What a reader of the figures should know of a stage."""
    now = {other.name: other.manifest.get("fingerprint") for other in run.finished}
    made_from = stage.manifest.get("predecessors", {})
    again = [name for name, mark in made_from.items() if name in now and now[name] != mark]
    found = [f"made from another {name} than there is now" for name in again]
    stopped = stage.metrics.get("stopped")
    return [*found, *([str(stopped)] if stopped else [])]


def versions(run: Run) -> list[Block]:
    """The packages that made the stages: a line where all were made by the same ones, a column for each else."""
    by_stage = {s.name: {"python": s.manifest.get("python")} | s.manifest.get("versions", {}) for s in run.finished}
    packages = list(dict.fromkeys(package for found in by_stage.values() for package in found))
    first = by_stage[run.finished[0].name]
    if all(found == first for found in by_stage.values()):
        return [Text(", ".join(f"{package} {of}" for package, of in first.items() if of) + ".", "Versions")]
    rows = [Row([package, *(str(found.get(package) or "-") for found in by_stage.values())]) for package in packages]
    return [Text("", "Versions"), Table(["package", *by_stage], rows)]


def base(run: Run) -> str:
    """The base model, as the config names it."""
    names = [s.manifest.get("config", {}).get("model", {}).get("name_or_path") for s in run.finished]
    return next((str(name) for name in reversed(names) if name), "unknown")


# ---- what it took


def costs(run: Run) -> list[Block]:
    """Time and peak memory of each stage."""
    kinds = {"gpu": "GPU, MB", "reserved": "reserved there, MB", "rss": "resident, MB", "anonymous": "anonymous, MB"}
    kinds = {k: title for k, title in kinds.items() if any(k in s.manifest.get("peak_memory", {}) for s in run.stages)}
    rows = []
    for stage in run.stages:
        memory, steps = stage.manifest.get("peak_memory", {}), max((row["step"] for row in stage.log), default=None)
        rows.append(
            Row(
                [
                    stage.name,
                    duration(stage.manifest["seconds"]) if stage.state == "finished" else stage.state,
                    number(steps),
                    *(number(memory.get(kind)) for kind in kinds),
                    moment(stage.manifest.get("finished", "")),
                ],
                hue(stage.name),
            )
        )
    total = duration(sum(stage.manifest["seconds"] for stage in run.finished))
    note = (
        f"All finished stages: {total}. Time is that of the wall clock, with loading, measuring and saving; memory is "
    )
    note += "the process's peak."
    return [Table(["stage", "time", "steps", *kinds.values(), "finished (UTC)"], rows, note=note)]


def commands(run: Run) -> list[Block]:
    """The commands that made the stages."""
    swept = any("/" in stage.name for stage in run.stages)
    text = "In the set-up .venv, from the repository's folder."
    text += " A job of a sweep is shown with its own values; run alone, it becomes a stage." if swept else ""
    return [Text(text), Commands([command(stage.manifest) for stage in run.stages])]


def moment(iso: str) -> str:
    """A manifest's time for people: `2026-11-25 13:36`."""
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M") if iso else "-"
