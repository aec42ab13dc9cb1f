"""The report of a run: one HTML file that needs nothing else, and its tables as Markdown. No torch is imported.

`reading` takes what the run's folder holds, `sections` says it in tables, plots and words, `plots` draws, and `page`
sets all of it as HTML and as Markdown.
"""

from rlhf_recipes.report.page import html, markdown
from rlhf_recipes.report.reading import Run, Trained
from rlhf_recipes.report.sections import Report, report

__all__ = ["Report", "Run", "Trained", "html", "markdown", "report"]
