"""The examples of a data set by their ids, and every visit that a curriculum makes to them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pocl.common.errors import UserError
from pocl.data.dataset import Split
from pocl.difficulty.ranking import Ranking

ID = "id"  # the column that tells examples apart


class Visit(NamedTuple):
    """One example at one optimiser step."""

    split: Split
    position: int


class Visits:
    """Every visit to an example of a Split, in turn: what a data loader reads."""

    def __init__(self, split: Split, positions: np.ndarray) -> None:
        self.split, self.positions = split, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, visit: int) -> Visit:
        return Visit(self.split, int(self.positions[visit]))


def ids_of(dataset: Any) -> list[Hashable]:
    """The ids of a data set's examples.  Raises UserError where there are none."""
    if isinstance(dataset, Split):
        return list(dataset.ids.tolist())
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "select"):
        kind = type(dataset).__name__
        raise UserError(f"the data set is of type {kind}, which cannot be reordered; give a `datasets.Dataset`")
    if ID not in dataset.column_names:
        raise UserError(
            f"the data set has no column {ID!r} (it has {', '.join(dataset.column_names)}); before it is ranked, add "
            f"one: dataset.add_column({ID!r}, list(range(len(dataset))))"
        )
    return list(dataset[ID])


def order_of(records: Sequence[Mapping[str, Any]], ids: Sequence[Hashable]) -> np.ndarray:
    """The positions among ``ids`` [N] of the ranked examples, easiest first.  -> [N].

    Raises UserError unless ``records`` rank just these examples, each once.
    """
    ranked = [record.get(ID) for record in records]
    for others, known, what in (
        (ranked, set(ids), "the ranking names {} examples that the data set does not hold"),
        (ids, set(ranked), "the data set holds {} examples that the ranking does not name"),
    ):
        strangers = [example for example in others if example not in known]
        if strangers:
            first = ", ".join(map(str, strangers[:3])) + (", …" if len(strangers) > 3 else "")
            raise UserError(f"{what.format(len(strangers))} ({first}); rank this data set, or give the ranked one")
    for name, found in (("the data set", ids), ("the ranking", ranked)):
        if len(set(found)) != len(found):
            twice = next(example for number, example in enumerate(found) if example in found[:number])
            raise UserError(f"{name} has the id {twice} twice; every example needs an id of its own")
    return Ranking.of(records, np.array(ids)).order
