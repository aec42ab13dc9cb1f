"""A second scorer, which training never sees, and what follows when it and the training reward part.

Optimized hard enough, every learned reward goes on rising while what it stands for falls (Gao et al., arXiv
2210.10760). Importing this package imports no torch.
"""

from rlhf_recipes.guard.scorer import Scorer, from_config

__all__ = ["Scorer", "from_config"]
