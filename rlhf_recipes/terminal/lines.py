"""Lines on the screen: no wall of warnings, one line for each log record, and all of them clear of a bar."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

# Warnings that every run on good settings would show, each with its reason. Any other is shown, on one line.
KNOWN_WARNINGS = (
    # TRL 1.16 and PEFT 0.21 use the name that transformers 5.24 replaces by `activation_checkpointing`, until its v6.
    (FutureWarning, r"`(is_)?gradient_checkpointing\w*` is deprecated"),
    # torch, on a machine without GPU: transformers asks for pinned memory by default, torch then leaves it out.
    (UserWarning, r"'pin_memory' argument is set as true but no accelerator is found"),
)

KNOWN_LOGS = (
    # Bitsandbytes looks for an optional kernel on the hub, for faster 4-bit inference on CPU; its own one does as well.
    # https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2064
    ("bitsandbytes.backends.cpu.ops", r"Failed to load CPU gemm_4bit_forward from kernels-community"),
    # A causal model is loaded as a reward model: its LM head stays behind and the score head is new. No other key may
    # be missing or left over.
    (
        "transformers.modeling_utils",
        r"ForSequenceClassification LOAD REPORT.*\n"
        r"Key.*\n-[-+]*.*\n(lm_head\.weight.*UNEXPECTED.*\n|score\.weight.*MISSING.*\n)+(?!.*\|)",
    ),
)


def quiet() -> None:
    """Silence what is known and harmless, and put logs and other warnings on one line each, clear of the bar.

    To be called before torch and the libraries around it are imported.
    """
    for category, message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    for name, message in KNOWN_LOGS:
        logging.getLogger(name).addFilter(_Known(message))
    warnings.showwarning = _show_warning
    root = logging.getLogger()
    if not any(isinstance(handler, _Lines) for handler in root.handlers):
        root.addHandler(_Lines())
    logging.getLogger("rlhf_recipes").setLevel(logging.INFO)
    # The libraries' own bars: gone when done, and not shown for what takes less than two seconds or where nobody looks.
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TQDM_LEAVE", "")
    if not is_terminal(sys.stderr):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def say(text: object) -> None:
    """Write a line, or several, to the person, clear of a bar that may be on the screen; no text is no line."""
    if lines := str(text):
        _line(lines, sys.stdout)


def is_terminal(file: TextIO) -> bool:
    """Whether a bar can be seen: a terminal, and of some size (those of containers may have none)."""
    return file.isatty() and min(os.get_terminal_size(file.fileno())) > 0


class _Known(logging.Filter):
    """Keeps the log records of one known message back."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = re.compile(message)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.message.search(re.sub(r"\x1b\[[\d;]*m", "", record.getMessage()))


class _Lines(logging.Handler):
    """Writes log records to stderr, one line each; who warned is named."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()} from {record.name.split('.')[0]}: {text}"
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        _line(text, sys.stderr)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    parts = Path(filename).parts
    place = "/".join(parts[parts.index("site-packages") + 1 :]) if "site-packages" in parts else filename
    _line(f"{category.__name__}: {message} ({place}:{lineno})", file or sys.stderr)


def _line(text: str, file: TextIO) -> None:
    encoding = file.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.write(text, file=file)
    else:
        file.write(text + "\n")
    file.flush()
