"""The losses that training leaves behind: a measure of difficulty that needs no pass of its own."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pocl import distributed
from pocl.data import Batch


class Snapshot:
    """The cross-entropy of each training example in the step that last trained on it.

    ``values`` [N] are nats per response token, NaN where an example has not been trained on yet; they are complete on
    every rank after ``share``.
    """

    def __init__(self, num_examples: int, values: Sequence[float | None] | None = None) -> None:
        self.values = np.full(num_examples, np.nan)
        if values is not None:
            self.values[:] = [np.nan if value is None else value for value in values]
        self._noted: list[tuple[np.ndarray, Tensor, Tensor]] = []

    def note(self, positions: np.ndarray, batch: Batch, cross_entropy: Tensor) -> None:
        """Take in a micro-batch: positions [B], the batch, cross-entropy of its response tokens [N]."""
        sums = batch.sum_by_example(cross_entropy)  # stay on the device until share
        self._noted.append((np.asarray(positions), sums, batch.num_labels))

    def share(self) -> None:
        """Bring together what the ranks have noted since the last time; of two losses the later one stays."""
        mine = {}
        for positions, sums, counts in self._noted:
            losses = sums.cpu() / counts
            mine |= {int(p): loss for p, loss in zip(positions, losses.tolist(), strict=True)}
        self._noted = []
        for position, loss in distributed.gather_by_id(mine).items():
            self.values[position] = loss

    def as_json(self) -> list[float | None]:
        """The values, None for NaN."""
        return [None if np.isnan(value) else float(value) for value in self.values]
