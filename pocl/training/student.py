"""The student in training: gradients of its objective, updates of its weights."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data.batch import send
from pocl.losses import DistillationLoss
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective, Weights
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from pocl.training.batches import MicroBatch
from pocl.training.engine import Engine
from pocl.training.module import StudentObjective
from pocl.training.settings import TrainSettings


@dataclass(frozen=True)
class Factors:
    """What multiplies each example's KD ratio and its whole loss, by position in the data; None: 1 for all.  [N]."""

    ratio: np.ndarray | None
    loss: np.ndarray | None

    def of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both of some examples.  [B] -> [B], [B]."""
        ones = np.ones(len(positions))
        ratio, loss = (ones if each is None else each[positions] for each in (self.ratio, self.loss))
        return ratio, loss


class StudentInTraining:
    """A student under the engine, with the teacher that it follows (None: cross-entropy alone)."""

    def __init__(
        self, student: Student, teacher: Teacher | None, loss: DistillationLoss, settings: TrainSettings
    ) -> None:
        self.student, self.teacher, self.device = student, teacher, student.device
        # Whether its own text has a cross-entropy term.
        self.student_cross_entropy = settings.on_policy is not None and settings.on_policy.cross_entropy
        self.chunk_tokens = loss.chunk_size(student.head.num_logits, student.device)
        module = StudentObjective(student.model, student.head, chunk_tokens=self.chunk_tokens, fused=loss.fused)
        self.engine = Engine(module, settings.optimiser, student.device)

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained; under ZeRO-3 its weights are sharded."""
        return self.student.model

    @property
    def teacher_reads(self) -> bool:
        """Whether the teacher's trunk reads every batch."""
        return self.teacher is not None and self.teacher.online

    def forward_backward(
        self, micro: MicroBatch, objective: StageObjective, factors: Factors | None, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Add one micro-batch's gradient, divided by ``num_tokens``, the response tokens of the whole step.

        -> (summed objective, cross-entropy, divergence) [3], float64, and the cross-entropy of each token [N].
        """
        values = self.engine.forward(
            micro.batch, objective, self._teacher_states(micro), self._weights(micro, objective, factors)
        )
        parts = (values.loss.detach(), values.cross_entropy.double().sum(), values.divergence.double().sum())
        sums = torch.stack([part.double() for part in parts])
        # The gradient is all NaN if anything is not finite: then every rank skips the step.
        self.engine.backward(values.loss * (1.0 + 0.0 * sums.sum()).to(values.loss.dtype), num_tokens)
        return sums, values.cross_entropy

    def gathered(self) -> Student:
        """The student as it is now, with all of its weights here: in a copy if ZeRO-3 has sharded them."""
        return self.student.with_model(self.engine.gathered(self.student.model))

    def _teacher_states(self, micro: MicroBatch) -> HiddenStates | None:
        if self.teacher is None:
            return None
        known = micro.teacher_states
        return HiddenStates(self.teacher.states(micro.batch) if known is None else known, self.teacher.head)

    def _weights(self, micro: MicroBatch, objective: StageObjective, factors: Factors | None) -> Weights | None:
        """The weights of each example of a micro-batch [B]; None if they are the stage's for all."""
        no_cross_entropy = micro.of_student & (not self.student_cross_entropy)
        if factors is None and not no_cross_entropy.any():
            return None
        ratio, weight = (factors or Factors(None, None)).of(micro.positions)
        ratio = objective.kd_ratio * ratio
        both = np.stack([weight * ratio, weight * np.where(no_cross_entropy, 0.0, 1.0 - ratio)])
        return Weights(*send(torch.from_numpy(both).float(), self.device).unbind())
