"""How sure a mean over prompts and seeds is: bootstrap, a paired test, a correction for many (pure, numpy)."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
FLIPS = 10_000
_CHUNK = 250  # resamples at a time, so that 10,000 prompts take megabytes


def mean_of_sets(scores: Sequence[np.ndarray]) -> float:
    """The mean over sets of the mean over seeds and prompts.  One [S, P] array a set."""
    return float(np.mean([values.mean() for values in scores]))


def bootstrap_interval(
    scores: Sequence[np.ndarray], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of ``mean_of_sets`` when prompts and seeds are drawn again with replacement.

    One [S, P] array a set: S seeds, P prompts. With one seed prompts alone are drawn.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
    """
    dice = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in scores:
        num_seeds, num_prompts = values.shape
        for start in range(0, resamples, _CHUNK):
            count = min(_CHUNK, resamples - start)
            prompts = dice.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=count)  # [R, P]
            seeds = dice.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count)  # [R, S]
            drawn = (seeds * (prompts @ values.T)).sum(1) / (num_seeds * num_prompts)
            means[start : start + count] += drawn / len(scores)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p_value(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], *, flips: int = FLIPS, seed: int = 0
) -> float:
    """Two-sided p of the difference of two rows on the same prompts, by flipping signs of prompts at random.

    One [S, P] array a set and row; prompts in the same order. A prompt's difference is that of its means over seeds.
    Raises ValueError where the prompts differ in number.
    Source: Dror et al., The Hitchhiker's Guide to Testing Statistical Significance in NLP, ACL 2018.
    """
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        if one.shape[1] != other.shape[1]:
            raise ValueError(f"{one.shape[1]} prompts against {other.shape[1]}")
        differences.append((one.mean(0) - other.mean(0)) / (one.shape[1] * len(ours)))
    weights = np.concatenate(differences)
    observed = abs(weights.sum())
    dice = np.random.default_rng(seed)
    as_far = 0
    for start in range(0, flips, _CHUNK):
        signs = dice.integers(0, 2, size=(min(_CHUNK, flips - start), len(weights)), dtype=np.int8) * 2 - 1
        as_far += int((np.abs(signs @ weights) >= observed - 1e-12).sum())
    return (1 + as_far) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for their number.  Source: Holm, Scandinavian Journal of Statistics, 1979."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected
