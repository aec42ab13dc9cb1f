"""The report of a run: one HTML file that stands alone, with tables, curves, samples and commands; and Markdown.

    make report
    make report ARGS="run=mine"
    python -m recipes.report run=mine runs_dir=runs

It goes to runs/<run>/report.html and report.md, made afresh each time from what the run holds: any of its stages,
finished or not, sweeps, and beside them its evaluation and its over-optimization. Other overrides of the recipes are
checked and ignored, so that one ARGS serves them all.
"""

import sys
from pathlib import Path

from rlhf_recipes import terminal
from rlhf_recipes.config import plain_errors
from rlhf_recipes.errors import UserError
from rlhf_recipes.report import Run, html, markdown, report
from rlhf_recipes.report.command import parse
from rlhf_recipes.runs import disk


def write(run: Path) -> list[Path]:
    """Write the report of a run, given by its folder, beside its stages; returns the files.

    Raises:
        UserError: no such run, no finished stage in it, or the files cannot be written.
    """
    said = report(Run.read(run))
    files = {run / "report.html": html(said), run / "report.md": markdown(said)}
    for file, text in files.items():
        try:
            disk.write(file, text)
        except OSError as error:
            raise disk.disk_fault(error, file) or UserError(f"Cannot write {file}: {error.strerror}.") from error
    for fault in said.faults:
        terminal.say(f"note: {fault}")
    return [*files]


def main() -> None:
    """Check the command line, and write."""
    terminal.quiet()
    with plain_errors():
        for file in write(parse(sys.argv[1:], __doc__ or "")):
            terminal.say(file)


if __name__ == "__main__":
    main()
