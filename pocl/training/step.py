"""The gradient of one optimiser step: micro-batches forward and backward, the next step prepared meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocl.data.batch import Batch, send
from pocl.difficulty.training_losses import TrainingLosses
from pocl.losses.token import StageObjective, Weights
from pocl.models.teacher import TeacherSource
from pocl.training.batches import GlobalBatch, MicroBatch, MicroBatchSource
from pocl.training.engine import Engine


@dataclass(frozen=True)
class _Ready:
    """A global batch, cut into micro-batches, with everything on its way to the device."""

    whole: GlobalBatch
    batches: Sequence[Batch]  # of each micro-batch
    teacher_states: Sequence[Tensor | None]  # [N, H] likewise; None if the teacher is online, or there is none


class Gradients:
    """Accumulates the gradient of the student's objective over the micro-batches of a step, in the engine."""

    def __init__(
        self,
        batches: MicroBatchSource,
        engine: Engine,
        teacher: TeacherSource | None,
        snapshot: TrainingLosses,
        device: torch.device,
    ) -> None:
        self.batches, self.engine, self.teacher = batches, engine, teacher
        self.snapshot, self.device = snapshot, device
        self._ready: tuple[int, _Ready] | None = None  # with its step

    def add(
        self, examples: np.ndarray, step: int, term: StageObjective, factor: np.ndarray | None
    ) -> tuple[GlobalBatch, list[Tensor]]:
        """Add the gradient of the global batch ``examples`` [G] at optimiser step ``step``.

        ``factor`` [number of examples] multiplies the KD ratio of each example of the split; None is 1 for all.
        -> the global batch, and for each micro-batch the summed (objective, cross-entropy, divergence) [3], float64.
        """
        known, self._ready = self._ready, None
        ready = known[1] if known and known[0] == step else self._send(examples, step)
        parts = []
        rows = zip(ready.whole.micro_batches, ready.batches, ready.teacher_states, strict=True)
        for micro, batch, teacher_states in rows:
            sums = self.forward_backward(micro, batch, teacher_states, term, factor, ready.whole.num_response_tokens)
            parts.append(sums)
        return ready.whole, parts

    def make_ready(self, examples: np.ndarray, step: int) -> None:
        """Cut and send the global batch of the next step, while a GPU computes this one.

        Does nothing on-policy: the student's text depends on the update before it.
        """
        if self.batches.on_policy is None:
            self._ready = step, self._send(examples, step)

    def _send(self, examples: np.ndarray, step: int) -> _Ready:
        whole = self.batches.of_step(examples, step)
        batches = [micro.batch.to(self.device) for micro in whole.micro_batches]
        if self.teacher is None or self.teacher.online:
            return _Ready(whole, batches, [None] * len(batches))
        return _Ready(whole, batches, [self.teacher.states(batch) for batch in batches])

    def forward_backward(
        self,
        micro: MicroBatch,
        batch: Batch,
        teacher_states: Tensor | None,
        term: StageObjective,
        factor: np.ndarray | None,
        num_tokens: int,
    ) -> Tensor:
        """Add one micro-batch's gradient, divided by ``num_tokens``; see ``add``.  -> [3], float64.

        ``batch`` is the micro-batch's on the device; without ``teacher_states`` an online teacher reads it.
        """
        if teacher_states is None and self.teacher:
            teacher_states = self.teacher.states(batch)
        loss, cross_entropy, divergence = self.engine.forward(
            batch,
            term,
            teacher_states,
            self.teacher.head if self.teacher else None,
            self._weights(micro, term, factor),
        )
        sums = torch.stack([loss.detach().double(), cross_entropy.double().sum(), divergence.double().sum()])
        # The gradient is all NaN if anything is not finite: then every rank skips the step.
        self.engine.backward(loss * (1.0 + 0.0 * sums.sum()).to(loss.dtype), num_tokens)
        self.snapshot.note(micro.positions, micro.of_student, batch, cross_entropy)
        return sums

    def _weights(self, micro: MicroBatch, term: StageObjective, factor: np.ndarray | None) -> Weights | None:
        """The weights of each example of a micro-batch [B]; None if they are the stage's for all."""
        no_cross_entropy = micro.of_student & (not self.batches.student_cross_entropy)
        if factor is None and not no_cross_entropy.any():
            return None
        ratio = term.kd_ratio * (np.ones(len(micro.positions)) if factor is None else factor[micro.positions])
        both = torch.from_numpy(np.stack([ratio, np.where(no_cross_entropy, 0.0, 1.0 - ratio)])).float()
        return Weights(*send(both, self.device).unbind())
