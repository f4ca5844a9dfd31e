"""How certain a mean is: bootstrap intervals, the paired sign-flip permutation test, the paired t-test, Holm's."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 2000
FLIPS = 10_000
_CHUNK = 250  # resamples at a time, so that 10,000 prompts take megabytes


def mean_of_sets(scores: Sequence[np.ndarray]) -> float:
    """The mean over sets of the mean over training seeds, sampling seeds and prompts.  One [T, S, P] array a set."""
    return float(np.mean([values.mean() for values in scores]))


def bootstrap_intervals(
    rows: Sequence[Sequence[np.ndarray]], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> list[tuple[float, float]]:
    """The percentile bootstrap interval of each row's ``mean_of_sets``.

    A row is one [T, S, P] array a set: T training seeds, S sampling seeds, P prompts. Each is resampled with
    replacement at its own level: training seeds; for each one drawn the seeds of its answers; and prompts, which all
    share. Where there is one of a kind, it stays. Rows of the same shapes share their draws, which take nearly all of
    the time; a row has the interval that it has by itself.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993; Davison and Hinkley, Bootstrap Methods, 1997.
    """
    means = np.zeros((len(rows), resamples))
    for shapes, members in _alike([tuple(values.shape for values in row) for row in rows]).items():
        dice, trainings = np.random.default_rng(seed), shapes[0][0]
        # Of all sets together: a student that is drawn answers all of them.
        runs = np.random.default_rng([seed, 1]).multinomial(trainings, [1 / trainings] * trainings, size=resamples)
        for i, (_, num_seeds, num_prompts) in enumerate(shapes):
            for start in range(0, resamples, _CHUNK):
                count = min(_CHUNK, resamples - start)
                prompts = dice.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=count)  # [R, P]
                drawn = runs[start : start + count] * num_seeds  # answers of each training seed [R, T]
                seeds = dice.multinomial(drawn, np.full(num_seeds, 1 / num_seeds))  # [R, T, S]
                prompts = prompts.astype(np.float64)  # here: else every row's product converts them
                for row in members:
                    flat = rows[row][i].reshape(-1, num_prompts)  # [T * S, P]
                    sums = (seeds.reshape(count, -1) * (prompts @ flat.T)).sum(1)
                    means[row, start : start + count] += sums / (flat.size * len(shapes))
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=1)
    return [(float(low), float(high)) for low, high in ends.T]


def paired_p_values(
    pairs: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]], *, flips: int = FLIPS, seed: int = 0
) -> list[float]:
    """Two-sided p values of the paired sign-flip permutation test of two rows on the same prompts.

    A pair is two rows, each one [T, S, P] array a set; prompts in the same order. A prompt's difference is that of its
    means over all seeds; its sign is flipped at random. Pairs of as many prompts share their flips; a pair has the p
    that it has by itself. (scipy's permutation_test gives the same p, pair by pair, in a hundred times the time.)
    Raises ValueError where the prompts differ in number.
    Source: Dror et al., The Hitchhiker's Guide to Testing Statistical Significance in NLP, ACL 2018.
    """
    weights = [_differences(ours, theirs) for ours, theirs in pairs]
    observed = [abs(differences.sum()) for differences in weights]
    as_far = [0] * len(pairs)
    for num_prompts, members in _alike([len(differences) for differences in weights]).items():
        dice = np.random.default_rng(seed)
        for start in range(0, flips, _CHUNK):
            signs = dice.integers(0, 2, size=(min(_CHUNK, flips - start), num_prompts), dtype=np.int8) * 2 - 1
            signs = signs.astype(np.float64)  # here, for the same reason
            for pair in members:
                as_far[pair] += int((np.abs(signs @ weights[pair]) >= observed[pair] - 1e-12).sum())
    return [(1 + count) / (1 + flips) for count in as_far]


def _differences(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """What each prompt adds to the difference of the two rows' means, [prompts of all sets]."""
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        if one.shape[-1] != other.shape[-1]:
            raise ValueError(f"{one.shape[-1]} prompts against {other.shape[-1]}")
        differences.append((one.mean((0, 1)) - other.mean((0, 1))) / (one.shape[-1] * len(ours)))
    return np.concatenate(differences)


def _alike(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Key -> the places at which it stands."""
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values after Holm's correction.  Source: Holm, Scandinavian Journal of Statistics, 1979."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def paired_t(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, half the 95 % t-interval, two-sided p of the paired t-test) of differences over training seeds.

    Differences that are all alike have the interval 0; p is 1 if they are 0, else 0.  Raises ValueError for fewer
    than two.
    """
    if len(differences) < 2:
        raise ValueError(f"{len(differences)} difference(s); an interval needs two")
    values = np.asarray(differences, dtype=np.float64)
    mean, error = float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
    if error == 0.0:
        return mean, 0.0, 1.0 if mean == 0.0 else 0.0
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean, half, float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
