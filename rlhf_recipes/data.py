"""One way in for all data: hub datasets, local files, the embedded world and mixtures of them, checked and split.

    loaded = load(cfg.data, "preferences", seed=0)
    loaded.train, loaded.test        # datasets.Dataset in TRL's formats, with no prompt in common

`cfg.data` names what each stage reads (`sft`, `preferences`, `prompts`: one source or a list of them, see Source) and
`heldout`, the share or number of prompts that no stage trains on.
"""

import logging
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from hashlib import blake2b
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf

from rlhf_recipes import files
from rlhf_recipes.errors import UserError
from rlhf_recipes.files import Places
from rlhf_recipes.formats import (
    FORMS,
    MAPPINGS,
    STAGES,
    BadRow,
    Row,
    convert,
    example,
    find_form,
    is_conversational,
    nearest,
    prompt_key,
    render_whole,
    shown,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

READERS = {"sft": "sft needs", "preferences": "rm and dpo need", "prompts": "ppo needs"}
SHOWN_FAULTS = 5

Parts = tuple[list[Row], list[Row], set[str]]
"""Of one source: the training rows, the held-out rows, and the prompts that are not for training."""


@dataclass(frozen=True)
class Loaded:
    """What a stage trains on, and the held-out part, which shares no prompt with any stage's training part."""

    train: "Dataset"
    test: "Dataset"


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


@dataclass(frozen=True)
class Lengths:
    """How many rows a trainer cuts or drops at `max_length`, and the longest row in tokens."""

    rows: int
    longest: int
    max_length: int | None
    cut: int
    dropped: int

    def __str__(self) -> str:
        lost = [f"{n:,} would be {what}" for n, what in ((self.cut, "cut"), (self.dropped, "dropped")) if n]
        if not lost:
            return f"all {self.rows:,} rows fit max_length={self.max_length} (longest: {self.longest:,} tokens)"
        return (
            f"{self.cut + self.dropped:,} of {self.rows:,} rows are longer than max_length={self.max_length}: "
            f"{' and '.join(lost)} (longest: {self.longest:,} tokens)"
        )


def load(cfg_data: Any, stage: str, seed: int) -> Loaded:
    """Read, check, convert and split what a stage reads.

    Raises:
        UserError: for a source that cannot be read or has bad rows, an unknown key, or nothing left to train on.
    """
    sources, heldout = parse(cfg_data, stage)
    parts = [_split(source, stage, heldout, seed) for source in sources]
    _refuse_mixed_formats(sources, parts, stage)
    held = dict.fromkeys((key for _, _, keys in parts for key in keys), stage)
    if any(source.kind != "world" for source in sources):
        held = _held_out_elsewhere(cfg_data, stage, seed) | held
    trains = [_without(train, held, source) for source, (train, _, _) in zip(sources, parts, strict=True)]
    train = _mix(sources, trains, seed)
    test = [row for _, rows, _ in parts for row in rows]
    for name, rows in (("training", train), ("held-out", test)):
        if not rows:
            raise UserError(
                f"data.{stage} has no {name} rows: {len(train)} training and {len(test)} held-out rows came of "
                f"{', '.join(source.path for source in sources)} with data.heldout={heldout}. Give more rows, or "
                f"another data.heldout (a share between 0 and 1, or a number of prompts)"
            )
    log.info("data.%s: %s training and %s held-out rows", stage, f"{len(train):,}", f"{len(test):,}")
    return Loaded(_dataset(train), _dataset(test))


def describe(cfg_data: Any, stage: str) -> dict[str, Any]:
    """Fingerprint what a stage reads, for runs to see whether it changed, without reading its rows."""
    sources, heldout = parse(cfg_data, stage)
    described = []
    for source in sources:
        about = {f.name: value for f in fields(source) if f.name != "key" and (value := getattr(source, f.name))}
        about["columns"] = dict(source.columns)
        if source.kind == "files":
            found = [files.find(path, source.key) for path in (source.path, source.test) if path]
            about["files"] = {str(file): files.mark(file, source.key) for of_path in found for file in of_path}
        described.append(about)
    return {"heldout": heldout, "sources": described}


def check_batch(rows: int, batch: int) -> None:
    """Refuse fewer training prompts than one generation batch: the sampler would drop them all.

    Raises:
        UserError: with both numbers and what to set.
    """
    if rows < batch:
        raise UserError(
            f"data.prompts has {rows} training prompts, but a generation batch takes {batch}, and an incomplete batch "
            f"is dropped: nothing would be trained on. Give more prompts, or a smaller batch: "
            f"training.generation_batch_size={rows} or less"
        )


def check_lengths(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", recipe: str, max_length: int | None
) -> Lengths:
    """Count the rows that TRL's trainer of a recipe cuts or drops without a word.

    SFT and DPO cut the end off, and drop a row whose prompt alone fills `max_length`; the reward trainer drops every
    pair with an answer too long.

    Args:
        dataset: as `load` gives it, or with `chosen_ids` and `rejected_ids` for the reward trainer.
        recipe: `sft`, `rm` or `dpo`.
        max_length: as in the trainer's config; None is no limit.
    """
    columns = dataset.column_names
    answers: list[str | None] = [key for key in ("completion", "chosen", "rejected") if key in columns]
    limit = max_length or sys.maxsize
    longest = cut = dropped = 0
    rows = iter(dataset)
    while chunk := list(islice(rows, 1000)):
        if "chosen_ids" in columns:
            lengths = [max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in chunk]
        else:
            by_answer = [_token_counts(chunk, tokenizer, answer) for answer in answers or [None]]
            lengths = [max(row) for row in zip(*by_answer, strict=True)]
        longest = max(longest, *lengths)
        too_long = [row for row, length in zip(chunk, lengths, strict=True) if length > limit]
        if recipe == "rm":
            dropped += len(too_long)
            continue
        full = sum(n >= limit for n in _token_counts(too_long, tokenizer, None)) if "prompt" in columns else 0
        dropped += full
        cut += len(too_long) - full
    return Lengths(len(dataset), longest, max_length, cut, dropped)


def _token_counts(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", answer: str | None) -> list[int]:
    if not rows:
        return []
    text = [render_whole(row, tokenizer, answer) for row in rows]
    conversational = any(is_conversational(rows[0].get(key)) for key in ("prompt", "messages"))
    return [len(ids) for ids in tokenizer(text, add_special_tokens=not conversational)["input_ids"]]


# The config.


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
    nodes = _nodes(cfg, stage)
    if not nodes:
        faults.append(
            f"data.{stage} has no path: this data preset has no {stage}, which {READERS[stage]}. Take a preset that "
            f"has them (data=world, ultrafeedback, hh or tldr), or name your own: data.{stage}.path=<file or hub id>"
        )
    faults += [fault for key, node in nodes.items() for fault in _source_faults(key, node)]
    if faults:
        raise UserError("\n".join(faults))
    sources = [
        Source(
            **{name: value for name, value in node.items() if value is not None and name != "columns"},
            key=key,
            columns=tuple((node.get("columns") or {}).items()),
        )
        for key, node in nodes.items()
    ]
    if len({source.weight is None for source in sources}) > 1:
        raise UserError(f"data.{stage}: give a weight to each of the {len(sources)} sources, or to none")
    return sources, heldout


def _plain(cfg_data: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(cfg_data, resolve=True) if OmegaConf.is_config(cfg_data) else cfg_data
    return dict(plain)


def _nodes(cfg: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """The source nodes of a stage by their keys; none where the preset leaves the stage out (`path: null`)."""
    node = cfg.get(stage)
    if isinstance(node, list):
        return {f"data.{stage}[{i}]": one for i, one in enumerate(node)}
    left_out = not node or (isinstance(node, dict) and node.get("path") in (None, "???"))
    return {} if left_out else {f"data.{stage}": node}


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


# Reading.


def _open(source: Source, stage: str, seed: int) -> tuple[Places, Places | None]:
    """The rows of the training part and of the test part, where the source has one."""
    match source.kind:
        case "world":
            return _world(stage, seed)
        case "files":
            return _files(source)
        case _:
            return _hub(source)


def _world(stage: str, seed: int) -> tuple[Places, Places]:
    from rlhf_recipes import world

    make = {"sft": world.demonstrations, "preferences": world.rankings, "prompts": world.prompts}[stage]
    rows = make(seed)
    train, test = (
        [(f"world, {part} row {i}", row) for i, row in enumerate(rows[part], 1)] for part in ("train", "test")
    )
    return iter(train), iter(test)


def _files(source: Source) -> tuple[Places, Places | None]:
    found = files.find(source.path, source.key)
    if source.test:
        test = files.find(source.test, source.key)
    else:
        test = [file for file in found if files.is_held_out(file)]
        test = test if len(test) < len(found) else []
        if test:
            log.info("%s: held out by name: %s", source.key, ", ".join(map(str, test)))
    held_out = {file.resolve() for file in test}
    train = [file for file in found if file.resolve() not in held_out]
    columns = dict(source.columns)
    return files.rows(train, source.key, columns), files.rows(test, source.key, columns) if test else None


def _hub(source: Source) -> tuple[Places, Places | None]:
    from datasets import load_dataset

    try:
        splits = load_dataset(source.path, source.name, revision=source.revision)
    except Exception as error:  # the hub raises errors of many classes, and each is the user's to see
        raise UserError(
            f"{source.key}: {source.path} is no file or folder here, and the hub did not give it as a dataset "
            f"(name {source.name}, revision {source.revision}): {error}"
        ) from error
    train = source.split or "train"
    others = [train.replace("train", word) for word in ("test", "validation")]
    test = source.test or next((name for name in others if name in splits and name != train), None)
    for name in (train, test):
        if name and name not in splits:
            raise UserError(
                f"{source.key}: {source.path} has no split {name}{nearest(name, splits)}; it has {', '.join(splits)}"
            )

    def rows(name: str) -> Places:
        return ((f"{source.path}, {name} row {i}", row) for i, row in enumerate(splits[name], 1))

    return rows(train), rows(test) if test else None


def _convert(source: Source, places: Places, stage: str, quiet: bool = False) -> list[Row]:
    """Rename, map, check and convert the rows of a source; its bad rows are refused, or skipped, in one message."""
    good: list[Row] = []
    faults: list[tuple[str, BadRow]] = []
    form = shape = formless = None
    count = rankings = tied = 0
    for where, row in places:
        count += 1
        try:
            if isinstance(row, BadRow):
                raise row
            row = _rename(row, source)
            row = MAPPINGS[source.mapping](row) if source.mapping else row
            form = form or find_form(row, stage)
            if form is None:
                formless = formless or (where, row)
                raise BadRow(f"no {stage} can be read from its keys: {', '.join(row) or 'none'}")
            converted = convert(row, form, stage)
            for first in converted[:1]:
                found = _shape(first, stage)
                shape = shape or found
                if found != shape:
                    raise BadRow(f"this row has {found}, but the rows before have {shape}")
        except BadRow as fault:
            faults.append((where, fault))
            continue
        if form == ("prompt", "responses", "ranking"):
            rankings += 1
            tied += not converted
        good += converted
    if formless and not form:
        raise UserError(_no_form(source, *formless, stage))
    if faults:
        _report(source, faults, count, example(form or FORMS[stage][0], bool(shape and "messages" in shape)), quiet)
    if rankings and not quiet:
        note = f" ({tied:,} with nothing but ties gave none)" if tied else ""
        log.info("%s: %s pairs of %s rankings%s", source.key, f"{len(good):,}", f"{rankings:,}", note)
    return good


def _rename(row: Row, source: Source) -> Row:
    for ours, theirs in source.columns:
        if theirs not in row:
            keys = ", ".join(row)
            raise BadRow(f"`{theirs}` ({source.key}.columns.{ours}) is missing{nearest(theirs, row)}; keys: {keys}")
    theirs_alone = {theirs for _, theirs in source.columns}
    return {key: row[key] for key in row if key not in theirs_alone} | {ours: row[t] for ours, t in source.columns}


def _no_form(source: Source, where: str, row: Row, stage: str) -> str:
    """The message for a file whose columns are none of a stage's forms."""
    best = max(FORMS[stage], key=lambda form: sum(bool(get_close_matches(key, row)) for key in form) / len(form))
    missing = [key for key in best if key not in row]
    near = {key: next(iter(get_close_matches(key, row, n=1)), "<its name>") for key in missing}
    return (
        f"{source.key}: {where}: no {' and no '.join(f'`{key}`{nearest(key, row)}' for key in missing)}; "
        f"columns: {', '.join(row) or 'none'}; allowed: {', or '.join(' + '.join(form) for form in FORMS[stage])}\n"
        f"A good row:\n  {example(best)}\n"
        f"If a column has another name, say so: {' '.join(f'{source.key}.columns.{k}={v}' for k, v in near.items())}"
    )


def _report(source: Source, faults: list[tuple[str, BadRow]], count: int, good: str, quiet: bool) -> None:
    """Refuse the bad rows of a source, or say that they are skipped."""
    if len(faults) == count > 1 and len({str(fault) for _, fault in faults}) == 1:
        listed = [f"  every row: {faults[0][1]}"]
    else:
        listed = [f"  {where}: {fault}" for where, fault in faults[:SHOWN_FAULTS]]
        if more := len(faults) - len(listed):
            listed.append(f"  ... and {more:,} more")
    what = f"{source.key}: {len(faults):,} of {count:,} rows of {source.path}"
    lines = "\n".join(listed)
    if source.bad_rows == "skip" and len(faults) < count:
        log.log(logging.DEBUG if quiet else logging.WARNING, "%s are skipped:\n%s", what, lines)
        return
    raise UserError(
        f"{what} cannot be used:\n{lines}\nA good row:\n  {good}\n"
        f"Mend them, or leave them out: {source.key}.bad_rows=skip"
    )


def _shape(row: Row, stage: str) -> str:
    """What all rows of a dataset must have in common: their columns, and text or messages in them."""
    columns = [
        key for key in row if key in ("messages", "text", "prompt", "completion", "chosen", "rejected", "margin")
    ]
    columns = ["prompt"] if stage == "prompts" else columns
    return f"{' + '.join(columns)} as {'messages' if is_conversational(row[columns[0]]) else 'text'}"


def _refuse_mixed_formats(sources: list[Source], parts: list[Parts], stage: str) -> None:
    shapes = {
        f"{source.key}{part}": _shape(rows[0], stage)
        for source, (train, test, _) in zip(sources, parts, strict=True)
        for part, rows in (("", train), (", test part", test))
        if rows
    }
    if len(set(shapes.values())) > 1:
        listed = "\n".join(f"  {key}: {shape}" for key, shape in shapes.items())
        raise UserError(
            f"data.{stage}: all rows must have one format, found\n{listed}\n"
            f"mapping=chat on a source turns its plain text into messages"
        )


# Splitting and mixing.


def _split(source: Source, stage: str, heldout: float, seed: int) -> Parts:
    train_places, test_places = _open(source, stage, seed)
    train = _convert(source, train_places, stage)
    test = train if test_places is None else _convert(source, test_places, stage)
    used = _held_out(source, test, heldout, own_part=test_places is not None)
    chosen = [row for row in test if prompt_key(row) in used]
    if test_places is None:
        return [row for row in train if prompt_key(row) not in used], chosen, used
    if len(chosen) < len(test):
        log.info("%s: %s of the %s rows of its test part are used", source.key, f"{len(chosen):,}", f"{len(test):,}")
    return train, chosen, {prompt_key(row) for row in test}


def _held_out(source: Source, rows: list[Row], heldout: float, own_part: bool) -> set[str]:
    """The held-out prompts: those with the smallest hashes, so the same in every stage and with every seed.

    A test part of the source's own is used whole, unless `heldout` is a number of prompts.
    """
    prompts = {prompt_key(row) for row in rows}
    if heldout >= 1:
        size = int(heldout)
    else:
        size = len(prompts) if own_part else max(1, round(heldout * min(len(prompts), source.max_rows or len(prompts))))
    return set(sorted(prompts, key=lambda prompt: blake2b(prompt.encode(), digest_size=8).digest())[:size])


def _held_out_elsewhere(cfg_data: Any, stage: str, seed: int) -> dict[str, str]:
    """The prompts held out for the other stages, with the stage. A source that cannot be read there is told only."""
    held: dict[str, str] = {}
    cfg = _plain(cfg_data)
    for other in STAGES:
        if other == stage or not _nodes(cfg, other):
            continue
        try:
            sources, heldout = parse(cfg, other)
            for source in sources:
                train, test = _open(source, other, seed)
                rows = _convert(source, train if test is None else test, other, quiet=True)
                out = _held_out(source, rows, heldout, own_part=False) if test is None else map(prompt_key, rows)
                held |= dict.fromkeys(out, other)
        except UserError as error:
            log.warning(
                "data.%s may train on prompts that data.%s holds out, which cannot be read: %s", stage, other, error
            )
    return held


def _without(train: list[Row], held: dict[str, str], source: Source) -> list[Row]:
    """The training rows whose prompts are held out nowhere."""
    stages = [held.get(prompt_key(row)) for row in train]
    if out := {stage for stage in stages if stage}:
        n, of, by = len(stages) - stages.count(None), len(stages), ", ".join(f"data.{stage}" for stage in sorted(out))
        log.warning(
            "%s: %s of %s training rows left out: %s holds their prompts out", source.key, f"{n:,}", f"{of:,}", by
        )
    return [row for row, stage in zip(train, stages, strict=True) if stage is None]


def _mix(sources: list[Source], parts: list[list[Row]], seed: int) -> list[Row]:
    """Draw from each source: all rows, or as many as the weights allow with no row twice."""
    chance = random.Random(seed)
    sizes = [min(len(rows), source.max_rows or len(rows)) for source, rows in zip(sources, parts, strict=True)]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        sizes = [min(size, round(total * weight)) for size, weight in zip(sizes, weights, strict=True)]
    mixed: list[Row] = []
    for source, rows, size in zip(sources, parts, sizes, strict=True):
        mixed += rows if size == len(rows) else [rows[i] for i in sorted(chance.sample(range(len(rows)), size))]
        if size < len(rows) or len(sources) > 1:
            log.info("%s: %s of the %s training rows of %s", source.key, f"{size:,}", f"{len(rows):,}", source.path)
    if len(sources) > 1:
        chance.shuffle(mixed)
    return mixed


def _dataset(rows: list[Row]) -> "Dataset":
    from datasets import Dataset

    columns = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns}, on_mixed_types="use_json")
