"""The rows of one source: opened, renamed, mapped, checked and converted, its bad rows told in one message."""

import logging
from difflib import get_close_matches
from math import comb
from pathlib import Path

from rlhf_recipes.data import files
from rlhf_recipes.data.files import Places
from rlhf_recipes.data.formats import (
    FORMS,
    MAPPINGS,
    BadRow,
    Row,
    convert,
    example,
    find_form,
    is_conversational,
    nearest,
)
from rlhf_recipes.data.sources import Source
from rlhf_recipes.errors import UserError

log = logging.getLogger(__name__)

SHOWN_FAULTS = 5


def open_source(source: Source, stage: str, seed: int) -> tuple[Places, Places | None]:
    """The rows of the training part and of the test part, where the source has one."""
    match source.kind:
        case "world":
            return _world(stage, seed)
        case "files":
            return _files(source)
        case _:
            return _hub(source)


def convert_rows(source: Source, places: Places, stage: str, quiet: bool = False) -> list[Row]:
    """Rename, map, check and convert the rows of a source; its bad rows are refused, or skipped, in one message."""
    good: list[Row] = []
    faults: list[tuple[str, BadRow]] = []
    form = shape = formless = None
    count = rankings = tied = unordered = 0
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
                found = shape_of(first, stage)
                shape = shape or found
                if found != shape:
                    raise BadRow(f"this row has {found}, but the rows before have {shape}")
        except BadRow as fault:
            faults.append((where, fault))
            continue
        if form == ("prompt", "responses", "ranking"):
            rankings += 1
            tied += not converted
            unordered += comb(len(row["responses"]), 2) - len(converted)
        good += converted
    if formless and not form:
        raise UserError(_no_form(source, *formless, stage))
    if faults:
        _report(source, faults, count, example(form or FORMS[stage][0], bool(shape and "messages" in shape)), quiet)
    if rankings and not quiet:
        note = f" ({tied:,} with nothing but ties gave none)" if tied else ""
        note += f"; {unordered:,} pairs of equal rank or equal text are left out" if unordered else ""
        log.info("%s: %s pairs of %s rankings%s", source.key, f"{len(good):,}", f"{rankings:,}", note)
    return good


def _world(stage: str, seed: int) -> tuple[Places, Places]:
    from rlhf_recipes import world

    make = {"sft": world.demonstrations, "preferences": world.rankings, "prompts": world.prompts}[stage]
    rows = make(seed)
    train, test = (
        [(f"world, {part} row {i}", row) for i, row in enumerate(rows[part], 1)] for part in ("train", "test")
    )
    return iter(train), iter(test)


def find_parts(source: Source) -> tuple[list[Path], list[Path]]:
    """The files of the training part and of the test part."""
    found = files.find(source.path, source.key)
    if source.test:
        test = files.find(source.test, source.key)
    else:
        test = [file for file in found if files.is_held_out(file)]
        test = test if len(test) < len(found) else []
    held_out = {file.resolve() for file in test}
    return [file for file in found if file.resolve() not in held_out], test


def _files(source: Source) -> tuple[Places, Places | None]:
    train, test = find_parts(source)
    if test and not source.test:
        log.info("%s: held out by name: %s", source.key, ", ".join(map(str, test)))
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


def shape_of(row: Row, stage: str) -> str:
    """What all rows of a dataset must have in common: their columns, and text or messages in them."""
    columns = [
        key for key in row if key in ("messages", "text", "prompt", "completion", "chosen", "rejected", "margin")
    ]
    columns = ["prompt"] if stage == "prompts" else columns
    return f"{' + '.join(columns)} as {'messages' if is_conversational(row[columns[0]]) else 'text'}"
