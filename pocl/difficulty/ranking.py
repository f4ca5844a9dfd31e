"""From difficulty measures to one easy-to-hard order: ordinal ranks, reciprocal rank fusion (pure, numpy).

A difficulty signal is a name on the command line (``--difficulty teacher length``) and the columns of
difficulty.jsonl that it ranks by. To add one, name it in ``SIGNALS`` and its column in ``COLUMNS``, and measure it in
the place that its source names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RRF_K = 60  # Source: Cormack, Clarke and Buettcher, SIGIR 2009; POCL keeps it.

# Where a column is measured: student.py, Ranker._teacher_losses and plain_records in ranker.py, training_losses.py.
Source = Literal["student", "teacher", "data", "training"]


@dataclass(frozen=True)
class Column:
    """A measure of difficulty, one column of difficulty.jsonl."""

    label: str  # in reports and figures
    unit: str
    source: Source
    highest_is_easiest: bool = False


COLUMNS = {
    # of the student's greedy answer against the reference
    "rouge_l": Column("ROUGE-L", "0 to 1", "student", highest_is_easiest=True),
    # of the reference under the student
    "cross_entropy": Column("cross-entropy", "nats/token", "student"),
    # of the reference under the teacher: its confidence
    "teacher_cross_entropy": Column("the teacher's cross-entropy", "nats/token", "teacher"),
    # in the step that last trained on the example
    "snapshot_cross_entropy": Column("training loss", "nats/token", "training"),
    "response_tokens": Column("response length", "tokens", "data"),
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
    """The columns that these signals rank by, each once, in the order of ``COLUMNS``."""
    wanted = {column for signal in signals for column in SIGNALS[signal]}
    return [column for column in COLUMNS if column in wanted]


def sources_of(signals: Sequence[str]) -> set[Source]:
    """Where these signals are measured."""
    return {COLUMNS[column].source for column in columns_of(signals)}


def ranked_columns(ranking: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that the records of a difficulty.jsonl were ranked by."""
    return [column for column in COLUMNS if f"{column}_rank" in ranking[0]]


def ordinal_ranks(values: np.ndarray, example_ids: np.ndarray, *, highest_first: bool) -> np.ndarray:
    """Rank of each example, 1 = easiest; ties go to the lower example id.  [N], [N] -> [N], int64.

    Raises ValueError if a value is not finite: such an example cannot be ordered.
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

    ``measured`` has one record per example, with its ``id``; None in a column means that the example has no value
    there yet, and ranks it after those that have one.  Raises ValueError for a value that is not finite.
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
    values_known = np.array([values[i] for i in known], dtype=np.float64)
    ranks[known] = ordinal_ranks(values_known, ids[known], highest_first=COLUMNS[column].highest_is_easiest)
    ranks[unknown] = len(known) + ordinal_ranks(np.zeros(len(unknown)), ids[unknown], highest_first=False)
    return ranks
