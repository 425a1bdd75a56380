"""Whether two scores on the same examples differ by more than chance."""

from typing import Any

import numpy as np


def gap(mine: np.ndarray, theirs: np.ndarray, score: Any, draws: int = 400) -> tuple[float, float]:
    """Difference of two scores on the same examples, and its standard error.

    The error is the deviation over draws of N examples with replacement, the same for both.

    Args:
      mine, theirs: Outcomes (N, S), or (seeds, N, S) whose scores are averaged.
      score: From sums (..., S) to scores (...).
      draws: How often.
    """
    mine, theirs = (x if x.ndim == 3 else x[None] for x in (mine, theirs))
    count = mine.shape[1]
    rng = np.random.default_rng(0)
    weights = np.concatenate(
        [np.ones((1, count), int), rng.multinomial(count, np.full(count, 1 / count), draws)]
    )

    def scores(outcomes: np.ndarray) -> np.ndarray:
        return score(np.einsum("dn,ens->eds", weights, outcomes)).mean(axis=0)

    difference = scores(mine) - scores(theirs)
    return float(difference[0]), float(np.std(difference[1:], ddof=1))
