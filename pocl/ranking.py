"""From difficulty measures to one easy-to-hard order: ordinal ranks, reciprocal rank fusion (pure, numpy).

A difficulty signal is a name on the command line (``--difficulty teacher length``) and the columns of
difficulty.jsonl that it ranks by. To add one, name it in ``SIGNALS`` and its column in ``EASY_IS_HIGH``, and say in
``pocl/difficulty.py`` how it is measured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RRF_K = 60  # Source: Cormack, Clarke and Buettcher, SIGIR 2009; POCL keeps it.

# A column of difficulty.jsonl -> whether its highest value is the easiest example.
EASY_IS_HIGH = {
    "rouge_l": True,  # of the student's greedy answer against the reference, 0 to 1
    "cross_entropy": False,  # of the reference under the student, nats per response token
    "teacher_cross_entropy": False,  # the same under the teacher: how sure it is of the reference
    "snapshot_cross_entropy": False,  # the same in the step that last trained on the example
    "response_tokens": False,
}

SIGNALS: dict[str, tuple[str, ...]] = {
    "student": ("rouge_l", "cross_entropy"),  # POCL
    "rouge-l": ("rouge_l",),
    "cross-entropy": ("cross_entropy",),
    "teacher": ("teacher_cross_entropy",),
    "snapshot": ("snapshot_cross_entropy",),
    "length": ("response_tokens",),
}


def columns_of(signals: Sequence[str]) -> list[str]:
    """The columns that these signals rank by, each once, in the order of ``EASY_IS_HIGH``."""
    wanted = {column for signal in signals for column in SIGNALS[signal]}
    return [column for column in EASY_IS_HIGH if column in wanted]


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


def rank_examples(measured: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The records of difficulty.jsonl, easiest first: what was measured, the rank by each column, the fused score.

    ``measured`` has one record an example, with its ``id``; None in a column says that the example has no value there
    yet, and puts it behind those that have one.  Raises ValueError for a value that is not finite.
    """
    ids = np.array([record["id"] for record in measured])
    ranks = {column: _ranks_of_column(measured, ids, column) for column in columns}
    scores = reciprocal_rank_fusion(list(ranks.values()))
    return [
        dict(measured[i])
        | {f"{column}_rank": int(values[i]) for column, values in ranks.items()}
        | {"score": float(scores[i])}
        for i in easy_to_hard(scores, ids).tolist()
    ]


def _ranks_of_column(measured: Sequence[Mapping[str, Any]], ids: np.ndarray, column: str) -> np.ndarray:
    values = [record[column] for record in measured]
    known = np.array([i for i, value in enumerate(values) if value is not None], dtype=np.int64)
    unknown = np.array([i for i, value in enumerate(values) if value is None], dtype=np.int64)
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[known] = ordinal_ranks(
        np.array([values[i] for i in known], dtype=np.float64), ids[known], highest_first=EASY_IS_HIGH[column]
    )
    ranks[unknown] = len(known) + ordinal_ranks(np.zeros(len(unknown)), ids[unknown], highest_first=False)
    return ranks
