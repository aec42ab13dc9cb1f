"""What training changed: policies side by side on the same held-out prompts."""

from rlhf_recipes.evaluation.changes import Changes, changes
from rlhf_recipes.evaluation.intervals import GOLD, Interval, interval, summarize
from rlhf_recipes.evaluation.measures import classifier_scores, kl, rewards
from rlhf_recipes.evaluation.sampling import Sample, sample

__all__ = [
    "GOLD",
    "Changes",
    "Interval",
    "Sample",
    "changes",
    "classifier_scores",
    "interval",
    "kl",
    "rewards",
    "sample",
    "summarize",
]
