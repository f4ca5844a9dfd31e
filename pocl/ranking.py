"""From two difficulty measures to one easy-to-hard order: ordinal ranks, reciprocal rank fusion (pure, numpy)."""

from collections.abc import Sequence

import numpy as np

RRF_K = 60  # Source: Cormack, Clarke and Buettcher, SIGIR 2009; POCL keeps it.


def ordinal_ranks(values: np.ndarray, example_ids: np.ndarray, *, highest_first: bool) -> np.ndarray:
    """Rank of each example, 1 = easiest; ties go to the lower example id.  [N], [N] -> [N], int64.

    Raises ValueError where a value is not finite: such an example cannot be ordered.
    """
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        bad = np.asarray(example_ids)[~np.isfinite(values)][:5].tolist()
        raise ValueError(f"difficulty is not finite for example ids {bad}")
    order = np.lexsort((np.asarray(example_ids), -values if highest_first else values))
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.arange(1, len(values) + 1)  # Ranks start at 1: with k = 60 the first place weighs 1/61.
    return ranks


def reciprocal_rank_fusion(rankings: Sequence[np.ndarray], k: int = RRF_K) -> np.ndarray:
    """Sum over rankings of 1 / (k + rank); the highest score is the easiest.  n x [N] -> [N], float64."""
    return np.sum([1.0 / (k + np.asarray(ranks, dtype=np.float64)) for ranks in rankings], axis=0)


def easy_to_hard(scores: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Positions from the easiest (highest score) to the hardest; ties go to the lower example id.  [N] -> [N]."""
    return np.lexsort((np.asarray(example_ids), -np.asarray(scores)))
