"""Rows of JSONL, JSON, CSV and Parquet files, each with the place it stands at, for messages that say where."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from glob import glob, has_magic
from hashlib import blake2b
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, cast

from rlhf_recipes.data.formats import BadRow, Row, shown
from rlhf_recipes.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The formats; `.gz` may follow."""

HELD_OUT_NAME = re.compile(r"(^|[-_.])(test|validation|valid|val|eval|dev|heldout)([-_.]|\d|$)")
HASHED_BYTES = 256 * 2**20  # hashing a larger file would be felt at each start

Places = Iterator[tuple[str, Row | BadRow]]
"""Rows with their places; a BadRow says what is wrong where no row could be read."""


def suffix(path: Path) -> str:
    """The suffix that tells the format, in lower case and without `.gz`; empty where it is none of SUFFIXES."""
    last = Path(path.name.lower().removesuffix(".gz")).suffix
    return last if last in SUFFIXES else ""


def is_local(path: str) -> bool:
    """Tell a path on this machine, there or not, from a hub id."""
    return path.startswith((".", "/", "~")) or has_magic(path) or bool(suffix(Path(path))) or Path(path).exists()


def find(path: str, key: str) -> list[Path]:
    """The data files of a file's path, a folder or a glob, sorted.

    Args:
        path: as the user wrote it.
        key: where it stands in the config, for messages.

    Raises:
        UserError: where there are none, with what is there or near.
    """
    here = Path(path).expanduser()
    formats = ", ".join(SUFFIXES)
    if here.is_file():
        if not suffix(here):
            raise UserError(f"{key}: {path} is not in a known format; known are {formats}")
        return [here]
    if here.is_dir():
        visible = (f for f in here.rglob("*") if not any(part.startswith(".") for part in f.relative_to(here).parts))
        inside = sorted(file for file in visible if file.is_file())
    elif has_magic(path):
        inside = sorted(Path(match) for match in glob(str(here), recursive=True) if Path(match).is_file())
    else:
        there = [str(file) for file in here.parent.iterdir()] if here.parent.is_dir() else []
        near = get_close_matches(str(here), there, n=1)
        hint = f"did you mean {near[0]}?" if near else f"nothing like it is in {here.parent.resolve()}"
        raise UserError(f"{key}: there is no file or folder {path}; {hint}")
    files = [file for file in inside if suffix(file) and not file.name.startswith("dataset_info")]
    if not files:
        found = ", ".join(file.name for file in inside[:5]) or "nothing"
        raise UserError(f"{key}: {path} leads to no data files ({formats}); found {found}")
    return files


def is_held_out(file: Path) -> bool:
    """Tell a test part by its name: `test.jsonl`, `pairs-validation.parquet`, `test-00000-of-00001.parquet`."""
    return bool(HELD_OUT_NAME.search(file.name.lower().split(suffix(file))[0]))


def mark(file: Path, key: str) -> str:
    """Size and content hash, by which a changed file is told; beyond 256 MB size and time.

    Raises:
        UserError: for a file that cannot be read.
    """
    try:
        stat = file.stat()
        if stat.st_size > HASHED_BYTES:
            return f"{stat.st_size} bytes, {stat.st_mtime_ns}"
        return f"{stat.st_size} bytes, {blake2b(file.read_bytes(), digest_size=16).hexdigest()}"
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error}") from error


def rows(files: list[Path], key: str, columns: Mapping[str, str]) -> Places:
    """All rows of the files, one after another.

    Args:
        key: where their path stands in the config, for messages.
        columns: {ours: theirs}, by which CSV knows the cells that are lists.

    Raises:
        UserError: for a file that cannot be opened or is empty.
    """
    readers: dict[str, Callable[[IO[bytes]], Iterator[tuple[str, Any]]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": partial(_csv, columns=columns),
        ".parquet": _parquet,
    }
    for file in files:
        empty = True
        try:
            packed = file.suffix.lower() == ".gz"
            with cast("IO[bytes]", gzip.open(file) if packed else file.open("rb")) as stream:
                for place, row in readers[suffix(file)](stream):
                    empty = False
                    if not isinstance(row, dict | BadRow):
                        row = BadRow(f"a row must be an object {{column: value, ...}}, found {shown(row)}")
                    yield f"{file}, {place}", row
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{key}: {file} cannot be read: {error}") from error
        if empty:
            raise UserError(f"{key}: {file} is empty; it must have one row or more")


def _jsonl(lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line.decode("utf-8-sig").strip())
            except UnicodeDecodeError as error:
                row = _not_utf8(error)
            except json.JSONDecodeError as error:
                row = BadRow(f"not valid JSON: {error.msg} at column {error.colno} of {shown(line.decode().strip())}")
            yield f"line {number}", row


def _json(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """A list of rows. A file with one object a line is read as JSONL, whatever its suffix says."""
    content = stream.read()
    lines = content.splitlines()
    if not content.strip():
        return
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = len(content[: error.start].splitlines()) or 1
        yield f"line {line}", _not_utf8(error)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _jsonl(lines)
        else:
            yield f"line {error.lineno}", BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    else:
        if isinstance(found, list):
            yield from ((f"row {number}", row) for number, row in enumerate(found, 1))
        elif len(lines) == 1:
            yield "line 1", found
        else:
            yield "line 1", BadRow(f"the file must be a list of rows [{{...}}, {{...}}], found {shown(found)}")


def _csv(stream: IO[bytes], columns: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Cells under a header, as text; conversations, and what must be a list or a number, are JSON in the cell."""
    csv.field_size_limit(2**31 - 1)
    coded = {columns.get(name, name) for name in ("messages", "responses", "ranking", "margin")}
    reader = csv.reader(TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield f"line {line}", {key: _cell(cell, key in coded) for key, cell in zip(header, cells, strict=True)}
            elif cells:
                names = ", ".join(header)
                yield f"line {line}", BadRow(f"{len(cells)} cells under a header of {len(header)} ({names})")
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        yield f"line {line} or later", _not_utf8(error)
    except csv.Error as error:
        yield f"line {line}", BadRow(f"not valid CSV: {error}")


def _cell(cell: str, coded: bool) -> Any:
    try:
        value = json.loads(cell) if coded or cell.startswith("[{") else cell
    except json.JSONDecodeError:
        return cell
    conversation = isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)
    return value if coded or conversation else cell


def _parquet(stream: IO[bytes]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(stream).iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        yield f"row {number + 1}", BadRow(f"not valid Parquet: {error}")


def _not_utf8(error: UnicodeDecodeError) -> BadRow:
    return BadRow(f"not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8")
