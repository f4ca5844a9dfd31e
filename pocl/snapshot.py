"""The losses that training leaves behind: a measure of difficulty that needs no pass of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pocl import distributed


class Snapshot:
    """The cross-entropy of each training example in the step that last trained on it.

    ``values`` [N] are nats per response token, NaN where an example has not been trained on yet; they are complete on
    every rank after ``share``.
    """

    def __init__(self, num_examples: int, values: Sequence[float | None] | None = None) -> None:
        self.values = np.full(num_examples, np.nan)
        if values is not None:
            self.values[:] = [np.nan if value is None else value for value in values]
        self._noted: list[tuple[np.ndarray, Tensor]] = []

    def note(self, positions: np.ndarray, cross_entropy: Tensor, counts: Tensor) -> None:
        """Take in a micro-batch: positions [B], cross-entropy of response tokens [N], tokens of each example [B]."""
        of_example = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        sums = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
        sums.index_add_(0, of_example, cross_entropy.detach().double())
        self._noted.append((np.asarray(positions), sums / counts))  # stays on the device until share

    def share(self) -> None:
        """Bring together what the ranks have noted since the last time; of two losses the later one stays."""
        mine = {}
        for positions, losses in self._noted:
            mine |= {int(p): loss for p, loss in zip(positions, losses.tolist(), strict=True)}
        self._noted = []
        for position, loss in distributed.gather_by_id(mine).items():
            self.values[position] = loss

    def as_json(self) -> list[float | None]:
        """The values, None for NaN."""
        return [None if np.isnan(value) else float(value) for value in self.values]
