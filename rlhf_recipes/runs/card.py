"""The model card that lies beside every adapter: what it is, how to make it again, how good, from what."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_recipes.figures import number


def model_card(chain: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> str:
    """Markdown for the last of a chain of manifests, the stages it came from before it.

    Args:
        chain: manifests, first stage first.
        metrics: figures of the last stage, or groups of figures.
    """
    last = chain[-1]
    stage = last["stage"]
    base = last["config"].get("model", {}).get("name_or_path", "unknown")
    memory = ", ".join(f"{kind} {mb} MB" for kind, mb in last["peak_memory"].items())
    lineage = {"base": last.get("base") or "unknown"}
    for m in chain:  # the members of an ensemble of reward models differ in their seeds
        lineage[f"{m['stage']}, seed {m['seed']}" if m["stage"] in lineage else m["stage"]] = m["fingerprint"]
    sections = [
        f"---\nlibrary_name: peft\ntags: [rlhf-recipes, trl, lora, {stage}]\n---",
        f"# {last['run']}/{stage}",
        f"A LoRA adapter on the base `{base}`, made by the stage `{stage}` of RLHF Recipes with seed {last['seed']} on "
        f"{last['device']} in {last['seconds']:.0f} s (peak memory: {memory}).",
        "## Make it again",
        "\n".join(f"    {command(m)}" for m in chain),
        "`config.yaml` holds the composed configuration.",
        "## Figures",
        _table(("figure", "value"), _figures(metrics)),
        "## Where it comes from",
        _table(("stage", "fingerprint"), lineage),
        "## Versions",
        _table(("package", "version"), {"python": last["python"]} | last["versions"]),
    ]
    return "\n\n".join(sections) + "\n"


def command(manifest: Mapping[str, Any]) -> str:
    """The command that made a stage."""
    kept = [shlex.quote(o) for o in manifest["overrides"] if not o.startswith(("overwrite=", "runs_dir="))]
    return " ".join(["python -m", f"recipes.{manifest['stage']}", *kept])


def _figures(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, Mapping):
        return {k: v for key, value in node.items() for k, v in _figures(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): number(node)}


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {header[0]} | {header[1]} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])
