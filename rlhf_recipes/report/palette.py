"""One colour for each stage and policy, everywhere in a report, on a light and on a dark page."""

from __future__ import annotations

import re

# (on light, on dark), of at least 3:1 against the page; after Okabe and Ito's colours, which colour-blind people can
# tell apart. The light ones stand for their names in a drawing, so no two are the same.
STAGES = {
    "base": ("#6b7280", "#9aa3b2"),
    "sft": ("#0072b2", "#56a8e8"),
    "rm": ("#a3498b", "#e08fc4"),
    "dpo": ("#b86e00", "#e69f00"),
    "ppo": ("#00805c", "#1fc294"),
    "other": ("#4b5563", "#b3bac5"),
}
# For what has an order, such as the values of a sweep: from the low end of viridis to its high end.
STEPS = {
    "step1": ("#440154", "#a58ae0"),
    "step2": ("#3b528b", "#7d9df0"),
    "step3": ("#21818c", "#4cc3c9"),
    "step4": ("#2f8f4e", "#6fd67a"),
    "step5": ("#7f8a00", "#c9dc3c"),
}
COLOURS = STAGES | STEPS
INK = "#000000"  # in a drawing: the colour of the page's text
FAINT = "#808080"  # in a drawing: grids and references


def hue(policy: str) -> str:
    """The name of a policy's colour: that of its stage, `ppo` also for a job of its sweep."""
    found = re.match(r"[a-z]+", policy)
    return found[0] if found and found[0] in STAGES else "other"


def step(index: int, count: int) -> str:
    """The name of the colour of the index-th of some ordered things, spread over all steps."""
    names = [*STEPS]
    return names[round(index * (len(names) - 1) / max(count - 1, 1)) if count > 1 else 2]
