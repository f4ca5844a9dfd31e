"""From difficulty measures to one easy-to-hard order: ordinal ranks, reciprocal rank fusion (pure, numpy).

A difficulty signal is a name on the command line (``--difficulty teacher length``) and the columns of
difficulty.jsonl that it ranks by. To add one, write a file like ``length.py`` and name it in ``FILES``.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pocl.common.errors import UserError, closest
from pocl.difficulty import length, pass_rate, student, teacher, training_losses
from pocl.difficulty.measuring import Column, Source

Easiest = Literal["highest", "lowest"]  # which value of a score the easiest example has

RRF_K = 60  # Source: Cormack, Clarke and Buettcher, SIGIR 2009; POCL keeps it.

# Each names its columns (``COLUMNS``) and its signals (``SIGNALS``), and measures them (``measure``).
FILES = (student, pass_rate, teacher, training_losses, length)
COLUMNS: dict[str, Column] = {name: column for file in FILES for name, column in file.COLUMNS.items()}
SIGNALS: dict[str, tuple[str, ...]] = {name: columns for file in FILES for name, columns in file.SIGNALS.items()}


@dataclass(frozen=True, eq=False)
class Ranking:
    """The examples of a split from the easiest to the hardest.

    ``order`` [N] int64 holds their positions in the split, ``scores`` [N] their fused scores in that order (NaN where
    a file gave none), ``records`` what is known of each: the lines of difficulty.jsonl.
    """

    order: np.ndarray
    scores: np.ndarray
    records: Sequence[Mapping[str, Any]]

    def by_position(self, column: str) -> np.ndarray:
        """What a column holds of each example, in the order of the split.  -> [N], float64."""
        values = np.empty(len(self.order))
        values[self.order] = [record[column] for record in self.records]
        return values

    @classmethod
    def fuse(cls, measured: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> "Ranking":
        """The ranking of measured examples by these columns; positions are those in ``measured``.

        See ``rank_examples``.
        """
        return cls.of(rank_examples(measured, columns), np.array([record["id"] for record in measured]))

    @classmethod
    def of_scores(cls, rows: Iterable[Mapping[str, Any]], easiest: Mapping[str, Easiest]) -> "Ranking":
        """The ranking by scores that you have: columns of rows with an ``id``, such as a ``datasets.Dataset``.

        ``easiest`` says for each column whether its highest or its lowest value is the easiest example's; several are
        fused. An example whose value is None comes after those that have one.  Raises UserError for a column that is
        not there and for a value that is no finite number.
        """
        measured = [_scores_of(row, number, easiest) for number, row in enumerate(rows, start=1)]
        if not measured or not easiest:
            raise UserError("`rows` holds no example" if easiest else "`easiest` names no column")
        return cls.of(rank_examples(measured, easiest), np.array([row["id"] for row in measured]))

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], ids: np.ndarray) -> "Ranking":
        """The ranking that records, easiest first, give of the examples with these ids [N].

        Raises ValueError if they are not the records of just these examples.
        """
        position_of = {example_id: position for position, example_id in enumerate(ids.tolist())}
        ranked = [record.get("id") for record in records]
        if len(ranked) != len(position_of) or set(ranked) != set(position_of):
            raise ValueError(f"{len(ranked)} examples are ranked, and there are {len(position_of)} (or others)")
        order = np.array([position_of[example_id] for example_id in ranked], dtype=np.int64)
        scores = [record.get("score") for record in records]
        known = [score if isinstance(score, int | float) else np.nan for score in scores]
        return cls(order, np.array(known), records)


def ensure_signals(names: Sequence[str]) -> None:
    """Make sure that each is in ``SIGNALS``, where any metric of answers may join: a key of METRICS of
    ``pocl.evaluation.metrics``, or MODULE:FUNCTION.  Raises UserError for another name, and where there is none.
    """
    if not names:
        raise UserError(f"`signals` names none (known: {', '.join(SIGNALS)})")
    for name in names:
        if name in SIGNALS:
            continue
        if ":" not in name and name not in _metrics():
            raise UserError(
                f"unknown signal {name!r}{closest(name, SIGNALS)} (known: {', '.join(SIGNALS)}, MODULE:FUNCTION)"
            )
        student.add_metric(name)
        SIGNALS[name] = student.SIGNALS[name]
        COLUMNS.update({column: student.COLUMNS[column] for column in SIGNALS[name]})


def _metrics() -> Collection[str]:
    from pocl.evaluation.metrics import METRICS

    return METRICS


def column_named(name: str) -> Column:
    """What is known of a column; of another run's own metric its name alone."""
    return COLUMNS.get(name) or Column(name, "0 to 1", "student", highest_is_easiest=True)


def columns_of(signals: Sequence[str]) -> list[str]:
    """The columns that these signals rank by, each once, in the order of ``COLUMNS``."""
    wanted = {column for signal in signals for column in SIGNALS[signal]}
    return [column for column in COLUMNS if column in wanted]


def sources_of(signals: Sequence[str]) -> set[Source]:
    """Where these signals are measured."""
    return {COLUMNS[column].source for column in columns_of(signals)}


def ranked_columns(ranking: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that the records of a difficulty.jsonl were ranked by."""
    ranked = [name.removesuffix("_rank") for name in ranking[0] if name.endswith("_rank")]
    return sorted(ranked, key=lambda name: list(COLUMNS).index(name) if name in COLUMNS else len(COLUMNS))


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
    scores: np.ndarray = np.sum([1.0 / (k + np.asarray(ranks, dtype=np.float64)) for ranks in rankings], axis=0)
    return scores


def easy_to_hard(scores: np.ndarray, example_ids: np.ndarray) -> np.ndarray:
    """Positions from the easiest (highest score) to the hardest; ties go to the lower example id.  [N] -> [N]."""
    order: np.ndarray = np.lexsort((np.asarray(example_ids), -np.asarray(scores)))
    return order


def rank_examples(
    measured: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, Easiest]
) -> list[dict[str, Any]]:
    """The records of difficulty.jsonl, easiest first: what was measured, the rank by each column, the fused score.

    ``measured`` has one record per example, with its ``id``. ``columns`` are names of ``COLUMNS``, or any with what is
    the easiest there. None in a column means that the example has no value
    there yet, and ranks it after those that have one.  Raises ValueError for a value that is not finite.
    """
    ids = np.array([record["id"] for record in measured])
    easiest = columns if isinstance(columns, Mapping) else {name: _easiest(COLUMNS[name]) for name in columns}
    ranks = {column: _ranks_of_column(measured, ids, column, best == "highest") for column, best in easiest.items()}
    scores = reciprocal_rank_fusion(list(ranks.values()))
    return [
        dict(measured[i])
        | {f"{column}_rank": int(values[i]) for column, values in ranks.items()}
        | {"score": float(scores[i])}
        for i in easy_to_hard(scores, ids).tolist()
    ]


def _easiest(column: Column) -> Easiest:
    return "highest" if column.highest_is_easiest else "lowest"


def _scores_of(row: Mapping[str, Any], number: int, easiest: Mapping[str, Easiest]) -> dict[str, Any]:
    """The id and the scores of a row.  Raises UserError where one is missing or cannot be ordered."""
    for column in ("id", *easiest):
        if column not in row:
            raise UserError(f"row {number} has no column {column!r}{closest(column, row)} (it has {', '.join(row)})")
    for column, best in easiest.items():
        value = row[column]
        if best not in ("highest", "lowest"):
            raise UserError(f"`easiest` has {best!r} for {column!r}; it must be 'highest' or 'lowest'")
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise UserError(f"row {number}: {column!r} is {value!r}; it must be a finite number, or None")
    return {"id": row["id"]} | {column: row[column] for column in easiest}


def _ranks_of_column(
    measured: Sequence[Mapping[str, Any]], ids: np.ndarray, column: str, highest_first: bool
) -> np.ndarray:
    values = [record[column] for record in measured]
    known = np.array([i for i, value in enumerate(values) if value is not None], dtype=np.int64)
    unknown = np.array([i for i, value in enumerate(values) if value is None], dtype=np.int64)
    ranks = np.empty(len(values), dtype=np.int64)
    values_known = np.array([values[i] for i in known], dtype=np.float64)
    ranks[known] = ordinal_ranks(values_known, ids[known], highest_first=highest_first)
    ranks[unknown] = len(known) + ordinal_ranks(np.zeros(len(unknown)), ids[unknown], highest_first=False)
    return ranks
