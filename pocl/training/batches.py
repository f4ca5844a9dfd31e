"""What one optimiser step trains on: this rank's micro-batches, on the device, the next step's prepared meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocl.common import distributed
from pocl.data.batch import Batch
from pocl.data.dataset import Split
from pocl.data.micro_batches import MicroBatchLimits, micro_batches
from pocl.models.teacher import Teacher


@dataclass(frozen=True)
class Texts:
    """The examples of a global batch of G: positions [G], and the responses that are the student's, not the data's."""

    positions: np.ndarray
    responses: Sequence[Sequence[int] | None]

    @property
    def of_student(self) -> np.ndarray:
        """Which responses are the student's own.  [G], bool."""
        return np.array([response is not None for response in self.responses])


@dataclass(frozen=True)
class MicroBatch:
    """Some examples of a global batch: positions in the split [B], and whether the response is the student's [B]."""

    positions: np.ndarray
    of_student: np.ndarray
    batch: Batch  # on the device
    teacher_states: Tensor | None  # [N, H]; None if the teacher is online, or there is none


@dataclass(frozen=True)
class GlobalBatch:
    """One optimiser step's text: this rank's micro-batches, and counts over all ranks."""

    micro_batches: Sequence[MicroBatch]
    num_tokens: int  # inputs, without padding
    num_response_tokens: int
    num_student_texts: int  # responses that are the student's own


class BatchCutter:
    """Cuts the texts of a global batch into this rank's micro-batches and sends them to the device.

    Which texts are in a global batch depends neither on the limits nor on the number of ranks.
    """

    def __init__(self, train: Split, teacher: Teacher | None, limits: MicroBatchLimits, device: torch.device) -> None:
        self.train, self.teacher, self.limits, self.device = train, teacher, limits, device
        self._ready: tuple[int, GlobalBatch] | None = None  # with its step

    def cut(self, texts: Texts, step: int) -> GlobalBatch:
        """The global batch of these texts at an optimiser step: the one that ``prepare`` made, if it did."""
        ready, self._ready = self._ready, None
        return ready[1] if ready and ready[0] == step else self._cut(texts)

    def prepare(self, texts: Texts, step: int) -> None:
        """Cut and send the next step's texts now, while a GPU computes this one."""
        self._ready = step, self._cut(texts)

    def _cut(self, texts: Texts) -> GlobalBatch:
        lengths, prompt_lengths = self._lengths(texts), self.train.prompt_lengths[texts.positions]
        cuts = micro_batches(
            np.arange(len(texts.positions)),
            lengths,
            self.limits,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        return GlobalBatch(
            [self._send(texts, rows) for rows in cuts],
            num_tokens=int(lengths.sum()),
            num_response_tokens=int((lengths + 1 - prompt_lengths).sum()),
            num_student_texts=int(texts.of_student.sum()),
        )

    def _send(self, texts: Texts, rows: np.ndarray) -> MicroBatch:
        positions = texts.positions[rows]
        batch = self.train.batch(positions, [texts.responses[row] for row in rows])
        batch = (batch.packed() if self.limits.packed else batch).to(self.device)
        known = self.teacher.states(batch) if self.teacher and not self.teacher.online else None
        return MicroBatch(positions, texts.of_student[rows], batch, known)

    def _lengths(self, texts: Texts) -> np.ndarray:
        """The number of input tokens of each text.  -> [G]."""
        lengths = self.train.lengths[texts.positions]
        for row, response in enumerate(texts.responses):
            if response is not None:
                total = self.train.prompt_lengths[texts.positions[row]] + len(response)
                lengths[row] = min(total, self.train.max_length) - 1
        return lengths
