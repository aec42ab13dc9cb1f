"""What training changed: policies side by side on the same held-out prompts."""

from rlhf_recipes.evaluation.changes import Changes, changes
from rlhf_recipes.evaluation.intervals import GOLD, RATES, Interval, Rate, interval, rate, summarize
from rlhf_recipes.evaluation.measures import classifier_scores, kl, rewards
from rlhf_recipes.evaluation.sampling import Sample, sample
from rlhf_recipes.evaluation.selection import kept

__all__ = [
    "GOLD",
    "RATES",
    "Changes",
    "Interval",
    "Rate",
    "Sample",
    "changes",
    "classifier_scores",
    "interval",
    "kept",
    "kl",
    "rate",
    "rewards",
    "sample",
    "summarize",
]
