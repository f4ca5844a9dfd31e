"""The losses recorded during training: a measure of difficulty that needs no pass of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pocl.common.errors import UserError
from pocl.difficulty.measuring import Column, Request, Values

if TYPE_CHECKING:
    from torch import Tensor

    from pocl.data.batch import Batch

# in the step that last trained on the example
COLUMNS = {"snapshot_cross_entropy": Column("training loss", "nats/token", "training")}
SIGNALS = {"snapshot": ("snapshot_cross_entropy",)}


def measure(request: Request, columns: Sequence[str]) -> Values:
    """The training loss of every example; None for those that had none."""
    if request.losses is None:
        raise UserError("`signals` snapshot are the losses of training; give `losses`")
    losses = zip(request.train.ids.tolist(), request.losses.tolist(), strict=True)
    return {example_id: {"snapshot_cross_entropy": None if math.isnan(loss) else loss} for example_id, loss in losses}


class TrainingLosses:
    """The cross-entropy of each training example in the step that last trained on it.

    ``values`` [N] are nats per response token, NaN for an example that has not been trained on yet; they are complete
    on every rank after ``share``. A loss that is not finite was not trained on, and changes nothing.
    """

    def __init__(self, num_examples: int) -> None:
        self.values = np.full(num_examples, np.nan)
        self._pending: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor]] = []

    def restore(self, values: Sequence[float | None]) -> None:
        """Restore what ``as_json`` returned."""
        self.values[:] = [np.nan if value is None else value for value in values]

    def note(self, positions: np.ndarray, of_student: np.ndarray, batch: Batch, cross_entropy: Tensor) -> None:
        """Record a micro-batch: positions [B], which responses are the student's own [B], cross-entropies [N].

        The student's own text does not count: examples are ranked by the loss of the reference.
        """
        sums = batch.sum_by_example(cross_entropy)  # stay on the device until share
        self._pending.append((np.asarray(positions), of_student, sums, batch.num_labels))

    def share(self) -> None:
        """Merge what the ranks have noted since the last call; of two losses the later one is kept."""
        from pocl.common import distributed

        mine: dict[int, float] = {}
        for positions, of_student, sums, counts in self._pending:
            losses = (sums.cpu() / counts).tolist()
            rows = zip(positions.tolist(), losses, of_student.tolist(), strict=True)
            mine |= {position: loss for position, loss, own in rows if not own and math.isfinite(loss)}
        self._pending = []
        for position, loss in distributed.gather_by_id(mine).items():
            self.values[position] = loss

    def as_json(self) -> list[float | None]:
        """The values, None for NaN."""
        return [None if np.isnan(value) else float(value) for value in self.values]
