"""Which examples a stage trains on, and how far each relies on the teacher, under the newest ranking (pure, numpy)."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pocl.curriculum.stages import CURRICULA, Scheme, Stage, stage_order

Reliance = Literal["off", "hard", "linear"]


@dataclass(frozen=True)
class Pools:
    """The order of examples that a stage's pool positions refer to, and each example's factor of the KD ratio.

    ``order`` [N] holds positions in the training split; ``ranked`` [N] the same from the easiest to the hardest, or
    None before there is a ranking; ``factor`` [N] is by position in the split, None is 1 for all.
    """

    scheme: Scheme
    order: np.ndarray
    ranked: np.ndarray | None = None
    factor: np.ndarray | None = None
    reliance: Reliance = "off"
    threshold: float = 0.5

    def examples(self, stage: Stage, epoch: int, *, seed: int) -> np.ndarray:
        """The positions of a stage's examples in the shuffled order of one epoch.  -> [len(pool)], int64."""
        return self.order[stage_order(stage, epoch, seed=seed)]

    def rank(self, ranked: np.ndarray, stage: Stage | None = None) -> "Pools":
        """The pools under a new ranking [N], made before ``stage`` is trained (None: before the first).

        If a curriculum leaves examples behind, those before the stage's pool keep their places.
        """
        order = self.order
        if self.scheme.order == "ranked":
            behind = order[: stage.pool.start] if stage and self.scheme.left_behind else order[:0]
            order = np.concatenate([behind, ranked[~np.isin(ranked, behind)]])
        factor = None
        if self.reliance != "off":
            factor = np.empty(len(ranked))
            factor[ranked] = reliance(len(ranked), self.reliance, threshold=self.threshold)
        return replace(self, order=order, ranked=ranked, factor=factor)


def unranked_pools(
    num_examples: int, curriculum: str, *, seed: int, reliance: Reliance = "off", threshold: float = 0.5
) -> Pools:
    """The pools before anything is ranked: shuffled once if the curriculum says so, else in the order of the data."""
    scheme = CURRICULA[curriculum]
    order = random_order(num_examples, seed=seed) if scheme.order == "random" else np.arange(num_examples)
    return Pools(scheme, order, reliance=reliance, threshold=threshold)


def random_order(num_examples: int, *, seed: int) -> np.ndarray:
    """The positions shuffled once, in place of an easy-to-hard order.  -> [N], int64."""
    return np.random.default_rng([seed, num_examples]).permutation(num_examples)


def reliance(num_examples: int, mode: Reliance, *, threshold: float = 0.5) -> np.ndarray:
    """How far each position of the easy-to-hard order relies on the teacher: a factor of the KD ratio.  -> [N].

    Difficulty percentile is 0 for the easiest and 1 for the hardest. ``off``: 1 everywhere; ``hard``: 1 at or above
    the threshold, 0 below it; ``linear``: the percentile itself.  Source: Khan, 2023 (selective reliance).
    """
    percentile = np.arange(num_examples) / max(1, num_examples - 1)
    if mode == "hard":
        return (percentile >= threshold).astype(np.float64)
    return percentile if mode == "linear" else np.ones(num_examples)
