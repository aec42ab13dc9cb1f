"""Files that a kill, a full disk or a second process cannot spoil: atomic writes, fingerprints, locks, plain errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rlhf_recipes.errors import UserError

PIECE, PIECES, WHOLE = 2**16, 256, 2**26  # bytes; what is larger than WHOLE may be hashed by PIECES


def write(path: Path, text: str) -> None:
    """Write a file so that at any moment it is either the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a mapping or a list as JSON, atomically."""
    write(path, json.dumps(plain(value), indent=2) + "\n")


def plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples as lists, NumPy's and torch's scalars as numbers, NaN as null."""
    return json.loads(json.dumps(value, default=lambda scalar: scalar.item()), parse_constant=lambda _: None)


def sync(path: Path) -> None:
    """Have the kernel put a file, or a folder's own list of files, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_into(source: Path, target: Path) -> None:
    """Move all that `source` holds into `target`, on the same disk, over what has the same name there."""
    for file in source.rglob("*"):
        sync(file)
    for item in sorted(source.iterdir()):
        if (target / item.name).is_dir():
            shutil.rmtree(target / item.name)
        os.replace(item, target / item.name)
    sync(target)


def hash_value(value: Any) -> str:
    """16 hex digits that stand for a value JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hash_file(file: Path, *, sampled: bool = False) -> str:
    """SHA-256 of a file; `sampled` reads files over 64 MiB in part: their size and 256 evenly spaced pieces."""
    size = file.stat().st_size
    with file.open("rb") as f:
        if not sampled or size <= WHOLE:
            return hashlib.file_digest(f, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for i in range(PIECES):
            f.seek((size - PIECE) * i // (PIECES - 1))
            digest.update(f.read(PIECE))
        return digest.hexdigest()


def fingerprint_files(folder: Path | str, *patterns: str) -> str:
    """Fingerprint of a folder's files (not of its sub-folders) by name and content, whatever the folder is called.

    Large files are sampled: the weights of a 7B model take a moment, and two trainings of one shape still differ in
    nearly every piece.

    Raises:
        UserError: no file matches.
    """
    files = sorted({p for pattern in patterns or ("*",) for p in Path(folder).glob(pattern) if p.is_file()})
    if not files:
        raise UserError(f"No file matches {' or '.join(patterns) or '*'} in {folder}.")
    return hash_value({p.name: hash_file(p, sampled=True) for p in files})


def fingerprint_weights(folder: Path | str, *others: str) -> str:
    """Fingerprint of the weights in a folder, and of files that match the other patterns.

    Raises:
        UserError: there are none.
    """
    weights = "*.safetensors" if any(Path(folder).glob("*.safetensors")) else "*.bin"
    return fingerprint_files(folder, weights, *others)


def acquire(path: Path) -> IO[str]:
    """Lock a file for this process and write the process's id into it.

    The kernel lifts the lock when the process ends, however it ends. It is a record lock (`lockf`, not `flock`):
    workers that were forked from a killed trainer do not keep it.

    Raises:
        UserError: another process holds it.
    """
    lock = path.open("a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        pid = lock.read().strip()
        lock.close()
        raise UserError(f"{path.parent} is being made by process {pid}: wait for it, or use run=<new name>.") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def holder(path: Path) -> str | None:
    """The id of the other process that holds a lock, if one does."""
    try:
        with path.open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return path.read_text().strip()
    except OSError:
        pass
    return None


def disk_fault(error: BaseException, path: Path) -> UserError | None:
    """A plain message for an error that says the disk is full, whoever raised it; None for any other error."""
    text = str(error)
    full = (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
        or "No space left on device" in text  # safetensors
        or "PytorchStreamWriter failed" in text  # torch.save, which does not say why
        or ("inline_container" in text and "unexpected pos" in text)  # likewise
    )
    if not full:
        return None
    where = Path(getattr(error, "filename", None) or path)
    there = next(p for p in (where, *where.resolve().parents) if p.exists())
    return UserError(
        f"The disk is full ({shutil.disk_usage(there).free // 2**20} MB free): cannot write {where}. "
        "Make room, or set runs_dir=<folder on another disk>, and run the same command again."
    )
