"""Several reward models as one: what their scores come to."""

from dataclasses import dataclass

from torch import Tensor

ENSEMBLES = MEAN, WORST, MEAN_MINUS_STD = "mean", "worst", "mean_minus_std"


@dataclass(frozen=True)
class Ensemble:
    """How the scores of several reward models become one.

    `mean`, `worst` (the lowest score) or `mean_minus_std`: where the members disagree, a policy has left what their
    raters have seen, and is not paid for it.

    Source: Coste et al. (arXiv 2310.02743), section 3.2. Their uncertainty-weighted objective takes off the variance;
    here it is the standard deviation over the members, which has the unit of a score.
    """

    how: str = MEAN
    spread_coef: float = 1.0

    def combine(self, scores: Tensor) -> Tensor:
        """One score for each episode (b,) from those of the members (m, b); of one member, its own to the last bit."""
        if self.how == WORST:
            return scores.amin(dim=0)
        mean = scores.mean(dim=0)
        return mean - self.spread_coef * spread(scores) if self.how == MEAN_MINUS_STD else mean


def spread(scores: Tensor) -> Tensor:
    """Standard deviation (b,) of the members' scores (m, b), over the members that there are."""
    return scores.std(dim=0, correction=0)
