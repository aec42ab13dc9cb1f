"""What a person at the terminal sees: a bar per stage, a summary at its end, short tables, and no wall of warnings.

Everything for people is written here; the library itself logs. Importing this package imports no torch.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rlhf_recipes.terminal.closing import summary
from rlhf_recipes.terminal.lines import is_terminal, quiet, say

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["progress", "quiet", "say", "summary"]


def progress(trainer: Trainer, stage: str) -> None:
    """Replace a trainer's own bar and its printed dicts by one bar, or without a terminal by a line each tenth."""
    from transformers import PrinterCallback, ProgressCallback
    from transformers.utils import logging as transformers_logging

    from rlhf_recipes.terminal.bar import Progress

    transformers_logging.disable_default_handler()  # its lines come through `quiet`'s handler, clear of the bar
    transformers_logging.enable_propagation()
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(stage, bar=is_terminal(sys.stderr) and not trainer.args.disable_tqdm))
