"""A run said in tables, plots and words: one function for each section, which gives no blocks where it has nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf_recipes.config.options import TRAINING
from rlhf_recipes.figures import duration, few, number
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


@dataclass(frozen=True)
class Measured:
    """Policies measured on one set of prompts, with as many completions each: figures that can be compared."""

    policies: dict[str, dict[str, Interval]]
    where: str
    prompts: int  # 0: not known


def results(run: Run) -> list[Block]:
    """How good each policy is, the last one's figures first, and a table for each set of prompts."""
    blocks: list[Block] = [*tiles(run)]
    for number_of, source in enumerate(shown := by_prompts(run)):
        found = source.policies
        names = [name for name in ("gold", "reward", "KL to SFT", "length") if any(name in m for m in found.values())]
        note = f"± is half of the 95% interval of the mean over prompts. {source.where}."
        if len(shown) > 1:
            note += " Compare within a table: the other is of other prompts or completions."
        note += f" Rough intervals{mark}." if source.prompts and (mark := few(source.prompts)) else ""
        for stage in run.finished:
            if "kept" in stage.metrics and stage.name in found:
                kept = f"the {stage.metrics['kept']} at held-out data, which flatters it there a little"
                note += f" {stage.name} is {kept}."
        blocks.append(measured(found, names or [*dict.fromkeys(k for m in found.values() for k in m)], note))
        drawn = [name for name in ("gold", "reward") if sum(name in m for m in found.values()) > 1]
        if drawn:
            blocks.append(Plots([_by_policy(name, found, f"-{number_of}" * bool(number_of)) for name in drawn]))
    return blocks


def by_prompts(run: Run) -> list[Measured]:
    """What was measured of the policies, by set of prompts: the evaluation first, then what it did not measure."""
    prompts, evaluated = run.evaluation.get("prompts") or {}, run.evaluation.get("policies") or {}
    found = [Measured(_in_order(evaluated), _evaluated_on(prompts), prompts.get("count", 0))] if evaluated else []
    for stages in _stages_by_prompts(run):
        policies: dict[str, dict[str, Interval]] = {}
        for stage in stages:
            for policy, values in stage.policies().items():
                policies[policy] = (
                    policies.get(policy, {}) | values if policy == stage.name else values | policies.get(policy, {})
                )
        if policies.keys() - evaluated.keys():
            names = ", ".join(stage.name for stage in stages)
            where = f"As measured at the end of {names}, on {(asked := len(stages[0].samples)):,} held-out prompts"
            again = [f"{name} was made again since" for name in _made_again(run, stages[0])]
            found.append(Measured(_in_order(policies), "; ".join([where, *again]), asked))
    return found


def _evaluated_on(prompts: Mapping[str, Any]) -> str:
    if not prompts.get("count"):
        return "As measured by the evaluation"
    asked = f"{prompts['count']:,} prompts ({prompts.get('source', 'unknown')})"
    return f"Evaluated on {asked}, {prompts.get('samples', 1)} completions each"


def _stages_by_prompts(run: Run) -> list[list[Trained]]:
    """The finished stages with a table, those together that were measured on the same prompts in the same way.

    One that came from another policy than there is now stands alone: its figures of that one are of the other.
    """
    groups: dict[str, list[Trained]] = {}
    for stage in run.finished:
        if stage.stage in TRAINING and stage.policies():
            config = stage.manifest.get("config", {})
            asked = [sample.get("prompt") for sample in stage.samples]
            how = [config.get("evaluation", {}).get(key) for key in ("samples", "max_new_tokens")]
            alone = stage.name if _made_again(run, stage) else ""
            groups.setdefault(disk.hash_value([asked, *how, config.get("seed"), alone]), []).append(stage)
    return list(groups.values())


def _in_order(policies: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, Interval]]:
    """The intervals of each policy, the base first and the stages as they follow each other."""
    order = ["base", *TRAINING]
    found = {policy: intervals(values) for policy, values in policies.items()}
    return dict(sorted(found.items(), key=lambda item: order.index(hue(item[0])) if hue(item[0]) in order else 9))


def tiles(run: Run) -> list[Tiles]:
    """The last policy of the run beside the one it began as, and what changed prompt by prompt.

    Both come from one measurement: the evaluation where it has both, and else the stage itself.
    """
    changed = [stage for stage in run.finished if "/" not in stage.name and stage.metrics.get("change")]
    if not changed:
        return []
    last, evaluated = changed[-1], run.evaluation.get("policies") or {}
    start = next(iter(last.policies()))
    both = last.name in evaluated and start in evaluated
    found = _in_order(evaluated) if both else last.policies()
    change = {} if both else intervals(last.metrics["change"])
    then = " of then" if not both and start in _made_again(run, last) else ""
    made = []
    for name, label in MEASURES.items():
        if name == "EOS" or name not in found[last.name] or name not in found[start]:
            continue
        value, was = (number(found[policy][name]).partition(" ")[0] for policy in (last.name, start))
        note = f"{start}{then} {was}"
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
    """Everything that was measured of the policies, a table for each set of prompts."""
    blocks: list[Block] = []
    for source in by_prompts(run):
        shown = list(dict.fromkeys(name for values in source.policies.values() for name in values))
        shown.sort(key=lambda name: [*MEASURES].index(name) if name in MEASURES else len(MEASURES))
        if set(shown) - {*MEASURES}:
            blocks.append(measured(source.policies, shown, f"{source.where}."))
    return [Text("", "Measures by policy"), *blocks] if blocks else []


def _by_policy(name: str, found: Mapping[str, Mapping[str, Interval]], suffix: str) -> Plot:
    marks = []
    for policy, values in found.items():
        if name in values and math.isfinite(values[name][0]):
            mean, half = values[name]
            marks.append(plots.Mark(policy, hue(policy), mean, mean - (half or 0), mean + (half or 0)))
    title, caption = f"{MEASURES[name].capitalize()} by policy", "On held-out prompts, with 95% intervals."
    return Plot(plots.forest(f"by-policy-{name}{suffix}", marks, x=MEASURES[name]), title, caption)


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
    found = [f"made from another {name} than there is now" for name in _made_again(run, stage)]
    stopped = stage.metrics.get("stopped")
    return [*found, *([str(stopped)] if stopped else [])]


def _made_again(run: Run, stage: Trained) -> list[str]:
    """The stages that it came from and that are others now."""
    now = {other.name: other.manifest.get("fingerprint") for other in run.finished}
    made_from = stage.manifest.get("predecessors", {})
    return [name for name, mark in made_from.items() if name in now and now[name] != mark]


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
