"""Loads what a stage reads: its sources split, mixed and held out, as datasets in TRL's formats."""

import json
import logging
import random
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data import files
from rlhf_recipes.data.formats import STAGES, Row, prompt_key
from rlhf_recipes.data.reading import convert_rows, find_parts, open_source, shape_of
from rlhf_recipes.data.sources import Source, parse, source_nodes
from rlhf_recipes.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Parts = tuple[list[Row], list[Row], set[str]]
"""Of one source: the training rows, the held-out rows, and the prompts that are not for training."""


@dataclass(frozen=True)
class Loaded:
    """What a stage trains on, and the held-out part, which shares no prompt with any stage's training part."""

    train: "Dataset"
    test: "Dataset"
    fingerprint: str  # of all rows

    @property
    def parts(self) -> "dict[str, Dataset]":
        """Both by what they are called."""
        return {"training": self.train, "held-out": self.test}


def load(cfg_data: Any, stage: str, seed: int) -> Loaded:
    """Read, check, convert and split what a stage reads.

    Raises:
        UserError: for a source that cannot be read or has bad rows, an unknown key, or nothing left to train on.
    """
    sources, heldout = parse(cfg_data, stage)
    _refuse_twice(sources, stage)
    parts = [_split(source, stage, heldout, seed) for source in sources]
    _refuse_mixed_formats(sources, parts, stage)
    held = dict.fromkeys((key for _, _, keys in parts for key in keys), stage)
    if any(source.kind != "world" for source in sources):
        held = _held_out_elsewhere(cfg_data, stage, seed) | held
    others = [f"data.{other}" for other in STAGES if other != stage and source_nodes(cfg_data, other)]
    if stage == "sft" and others and any("text" in row for rows, _, _ in parts for row in rows[:1]):
        log.warning(
            "data.sft: `text` rows have no prompt, so it cannot be checked whether they contain prompts that are held "
            "out of %s",
            " and ".join(others),
        )
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
    if stage == "preferences":
        train, test = _weighed(train), [_unweighed(row) for row in test]
    digest = blake2b(digest_size=8)
    for row in (*train, *test):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Loaded(_dataset(train), _dataset(test), digest.hexdigest())


def heldout_prompts(cfg: Any, test: "Dataset | None" = None, count: int | None = None) -> "Dataset | None":
    """`evaluation.prompts` of the held-out prompts, the same in every stage; None where the data have no prompts.

    Args:
        cfg: the config of a recipe.
        test: the held-out part of the prompts, where it is loaded already.
        count: another number of them.
    """
    count = cfg.evaluation.prompts if count is None else count
    if not count or not source_nodes(cfg.data, "prompts"):
        return None
    rows = (load(cfg.data, "prompts", cfg.seed).test if test is None else test).shuffle(seed=cfg.seed)
    return rows.select(range(min(count, len(rows))))


def describe(cfg_data: Any, stage: str) -> dict[str, Any]:
    """Fingerprint what a stage reads, for runs to see whether it changed, without reading its rows.

    What other stages read is there too, since prompts that they hold out are left out.
    """
    sources, heldout = parse(cfg_data, stage)
    described: dict[str, Any] = {"heldout": heldout, "sources": [_described(source) for source in sources]}
    if any(source.kind != "world" for source in sources):
        described["elsewhere"] = {
            other: _described_elsewhere(cfg_data, other)
            for other in STAGES
            if other != stage and source_nodes(cfg_data, other)
        }
    return described


def _described(source: Source) -> dict[str, Any]:
    about = {f.name: value for f in fields(source) if f.name != "key" and (value := getattr(source, f.name))}
    about["columns"] = dict(source.columns)
    if source.kind == "files":
        train, test = find_parts(source)
        about["files"] = {str(file): files.mark(file, source.key) for file in (*train, *test)}
        about |= {"test_files": len(test)} if test else {}
    return about


def _described_elsewhere(cfg_data: Any, stage: str) -> Any:
    try:
        return [_described(source) for source in parse(cfg_data, stage)[0]]
    except UserError:
        return "cannot be read"


def _refuse_twice(sources: list[Source], stage: str) -> None:
    """Refuse two sources that give the same rows: they would be counted twice, and no weight would be what it says."""
    read: dict[Any, str] = {}
    for source in sources:
        found = [str(file.resolve()) for file in files.find(source.path, source.key)] if source.kind == "files" else []
        about = source.name, source.split, source.revision, source.columns, source.mapping
        for rows in found or [source.path]:
            if (rows, about) in read:
                raise UserError(
                    f"data.{stage}: {rows} is read twice (by {read[rows, about]} and by {source.key}), and its rows "
                    "would count twice. Name it once; to draw more of it than of another source, give each a `weight`"
                )
            read[rows, about] = source.key


def _refuse_mixed_formats(sources: list[Source], parts: list[Parts], stage: str) -> None:
    shapes = {
        f"{source.key}{part}": shape_of(rows[0], stage)
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


def _split(source: Source, stage: str, heldout: float, seed: int) -> Parts:
    train_places, test_places = open_source(source, stage, seed)
    train = convert_rows(source, train_places, stage)
    test = train if test_places is None else convert_rows(source, test_places, stage)
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
    for other in STAGES:
        if other == stage or not source_nodes(cfg_data, other):
            continue
        try:
            sources, heldout = parse(cfg_data, other)
            for source in sources:
                train, test = open_source(source, other, seed)
                rows = convert_rows(source, train if test is None else test, other, quiet=True)
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


def _weighed(rows: list[Row]) -> list[Row]:
    """The weights of pairs (1 where a row has none) with mean 1, or no weights where all are equal."""
    weights = [row.get("weight", 1.0) for row in rows]
    if len(set(weights)) == 1:
        return [_unweighed(row) for row in rows]
    mean = sum(weights) / len(weights)
    return [row | {"weight": weight / mean} for row, weight in zip(rows, weights, strict=True)]


def _unweighed(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "weight"}


def _dataset(rows: list[Row]) -> "Dataset":
    from datasets import Dataset

    columns = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns}, on_mixed_types="use_json")
