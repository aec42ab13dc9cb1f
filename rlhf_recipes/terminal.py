"""What a person at the terminal sees: a bar per stage, a summary at its end, short tables, and no wall of warnings.

Everything for people is written here; the library itself logs. Importing this module imports no torch.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rlhf_recipes.figures import duration, number, table
from rlhf_recipes.runs import Stage, make_command

if TYPE_CHECKING:
    from transformers import Trainer

    from rlhf_recipes.evaluation import Changes

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

EXAMPLES = 4  # prompts shown with their answers
NEXT = {"sft": ("rm", "ppo"), "rm": ("ppo",), "dpo": (), "ppo": ()}


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
    if not _is_terminal(sys.stderr):
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def progress(trainer: Trainer, stage: str) -> None:
    """Replace a trainer's own bar and its printed dicts by one bar, or without a terminal by a line each tenth."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils import logging as transformers_logging

    from rlhf_recipes.progress import Progress

    transformers_logging.disable_default_handler()  # its lines come through `quiet`'s handler, clear of the bar
    transformers_logging.enable_propagation()
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(stage, bar=_is_terminal(sys.stderr) and not trainer.args.disable_tqdm))


def say(text: object) -> None:
    """Write a line, or several, to the person, clear of a bar that may be on the screen; no text is no line."""
    if lines := str(text):
        _line(lines, sys.stdout)


def summary(
    stage: Stage,
    made: str,
    figures: Mapping[str, object],
    changes: Changes | None = None,
) -> None:
    """Tell at the end of a stage what was made, where, how good, how long, how much memory, and what comes next.

    Args:
        stage: the stage, finished.
        made: what it made, in a few words.
        figures: how good it is, by name: numbers, or (mean, half of the 95% interval).
        changes: the policies before and after, compared: a table, and a few prompts that they answer differently.
    """
    manifest = stage.manifest
    size = sum(file["bytes"] for file in manifest["files"].values())
    shown = {name: value for name, value in figures.items() if not isinstance(value, Mapping | None)}
    memory = {"rss": "resident", "anonymous": "anonymous", "gpu": "on the GPU"}
    following = NEXT.get(stage.name, ())
    rows = {
        "made": f"{made}, {size / 1e6:.1f} MB",
        "where": f"{stage.path}{os.sep}",
        "how good": ", ".join(f"{name} {number(value)}" for name, value in shown.items()),
        "how long": duration(manifest["seconds"]),
        "memory": ", ".join(f"{mb:,} MB {memory[kind]}" for kind, mb in manifest["peak_memory"].items())
        + " at the peak",
        "next": make_command(following, manifest["overrides"]) if following else "",
    }
    say(f"\n{manifest['run']}/{stage.name} is finished\n" + "\n".join(f"  {k:<9} {v}" for k, v in rows.items() if v))
    if changes and changes.figures:
        say("\n" + table([{"held-out prompts": policy, **measured} for policy, measured in changes.figures.items()]))
        say("\n" + _answers(changes.samples))


def _answers(samples: Sequence[Mapping[str, str]]) -> str:
    """A few prompts with what each policy says, those first where they differ."""
    unlike = sorted(samples, key=lambda row: len(set(row.values()) - {row["prompt"]}) == 1)
    lines = []
    for row in unlike[:EXAMPLES]:
        width = max(map(len, row))
        lines += [
            f"  {name if name != 'prompt' else '?':<{width}} {textwrap.shorten(text, 160, placeholder=' ...')}"
            for name, text in row.items()
        ]
    return "\n".join(lines)


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


def _is_terminal(file: TextIO) -> bool:
    """Whether a bar can be seen: a terminal, and of some size (those of containers may have none)."""
    return file.isatty() and min(os.get_terminal_size(file.fileno())) > 0


def _line(text: str, file: TextIO) -> None:
    encoding = file.encoding or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.write(text, file=file)
    else:
        file.write(text + "\n")
    file.flush()
