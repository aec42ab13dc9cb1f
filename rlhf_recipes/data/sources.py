"""What a stage reads, as the `data` section of the config says it: sources, checked before anything is opened."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from omegaconf import OmegaConf

from rlhf_recipes.data import files
from rlhf_recipes.data.formats import MAPPINGS, STAGES, nearest, shown
from rlhf_recipes.errors import UserError

READERS = {"sft": "sft needs", "preferences": "rm and dpo need", "prompts": "ppo needs"}


@dataclass(frozen=True)
class Source:
    """One place that rows come from, under the names it has in `conf/data`."""

    key: str  # where it stands in the config: `data.sft` or `data.sft[1]`
    path: str  # `world`, a hub id, a file, a folder or a glob
    name: str | None = None  # hub: the configuration of the dataset
    split: str | None = None  # hub: the split to train on; default `train`
    revision: str | None = None  # hub: a commit, tag or branch
    test: str | None = None  # the held-out part: hub, a split; files, a path. Default: found by its name
    columns: tuple[tuple[str, str], ...] = ()  # (ours, theirs)
    mapping: str | None = None  # a name in formats.MAPPINGS
    weight: float | None = None  # share of the rows drawn in a mixture
    max_rows: int | None = None  # train on a sample of this size
    bad_rows: str = "refuse"  # or `skip`

    @property
    def kind(self) -> Literal["world", "files", "hub"]:
        """Where `path` leads."""
        if self.path == "world":
            return "world"
        return "files" if files.is_local(self.path) else "hub"


def parse(cfg_data: Any, stage: str) -> tuple[list[Source], float]:
    """The sources of a stage and `heldout`, checked; all faults in one message.

    Raises:
        UserError: for an unknown key, a wrong type, a stage with no source, or a weight on some sources only.
    """
    if stage not in STAGES:
        raise UserError(f"there is no data for {stage!r}; a stage reads one of {', '.join(STAGES)}")
    cfg = _plain(cfg_data)
    known = (*STAGES, "heldout")
    faults = [f"data.{key} is unknown{nearest(key, known)}" for key in cfg if key not in known]
    heldout = cfg.get("heldout", 0.1)
    number = isinstance(heldout, int | float) and not isinstance(heldout, bool)
    if not number or not (0 < heldout < 1 or (heldout >= 1 and heldout % 1 == 0)):
        faults.append(f"data.heldout is {shown(heldout)}; it must be a share between 0 and 1, or a number of prompts")
    found = source_nodes(cfg, stage)
    if not found:
        faults.append(
            f"data.{stage} has no path: this data preset has no {stage}, which {READERS[stage]}. Take a preset that "
            f"has them (data=world, ultrafeedback, hh or tldr), or name your own: data.{stage}.path=<file or hub id>"
        )
    faults += [fault for key, node in found.items() for fault in _source_faults(key, node)]
    if faults:
        raise UserError("\n".join(faults))
    sources = [
        Source(
            **{name: value for name, value in node.items() if value is not None and name != "columns"},
            key=key,
            columns=tuple((node.get("columns") or {}).items()),
        )
        for key, node in found.items()
    ]
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(f"data.{stage}: give a weight to each of the {len(sources)} sources, or to none")
    return sources, heldout


def is_world(cfg_data: Any) -> bool:
    """Whether all prompts are those of the embedded world, whose truth is known."""
    return all(source.kind == "world" for source in parse(cfg_data, "prompts")[0])


def source_nodes(cfg_data: Any, stage: str) -> dict[str, Any]:
    """The source nodes of a stage by their keys; none where the preset leaves the stage out (`path: null`)."""
    node = _plain(cfg_data).get(stage)
    if isinstance(node, list):
        return {f"data.{stage}[{i}]": one for i, one in enumerate(node)}
    left_out = not node or (isinstance(node, dict) and node.get("path") in (None, "???"))
    return {} if left_out else {f"data.{stage}": node}


def _plain(cfg_data: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(cfg_data, resolve=True) if OmegaConf.is_config(cfg_data) else cfg_data
    return dict(plain)


def _source_faults(key: str, node: Any) -> list[str]:
    """What is wrong with one source."""
    if not isinstance(node, dict) or not isinstance(node.get("path"), str):
        return [f"{key} is {shown(node)}; a source is {{path: <world, hub id, file, folder or glob>, ...}}"]
    known = [field.name for field in fields(Source) if field.name != "key"]
    choices = {"mapping": [*MAPPINGS], "bad_rows": ["refuse", "skip"]}
    faults = []
    for name, value in node.items():
        if name not in known:
            faults.append(f"{key}.{name} is unknown{nearest(name, known)}; a source has {', '.join(known)}")
        elif value is not None and (wanted := _wanted(name, value)):
            faults.append(f"{key}.{name} is {shown(value)}; it must be {wanted}")
        elif value is not None and name in choices and value not in choices[name]:
            allowed = ", ".join(choices[name])
            faults.append(f"{key}.{name}={value} is unknown{nearest(value, choices[name])}; it can be {allowed}")
    kind = Source(key, node["path"]).kind
    foreign = {"hub": (), "files": ("name", "split", "revision"), "world": ("name", "split", "revision", "test")}[kind]
    if given := [f"{key}.{name}={node[name]}" for name in foreign if node.get(name) is not None]:
        faults.append(
            f"{' and '.join(given)} can only be for a hub dataset, and {key}.path={node['path']} is none. For files of "
            f"your own start from a clean preset: data=files {key}.path={node['path']}"
        )
    return faults


def _wanted(name: str, value: Any) -> str | None:
    """What a source's value must be, where it is of the wrong type."""
    if name == "columns":
        good = isinstance(value, dict) and all(isinstance(theirs, str) for theirs in value.values())
        return None if good else "a table {ours: theirs}"
    if name in ("weight", "max_rows"):
        good = isinstance(value, int if name == "max_rows" else (int, float)) and not isinstance(value, bool)
        return None if good and value > 0 else "a number above 0"
    return None if isinstance(value, str) else "text"
