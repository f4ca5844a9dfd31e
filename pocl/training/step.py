"""One optimiser step: micro-batches forward and backward, the update, and what is not finite in them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from signal import SIGTERM

import torch
from torch import Tensor

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.interrupt import Interrupt
from pocl.curriculum.schedule import Update
from pocl.losses import DistillationLoss, StageObjective
from pocl.training.batches import BatchCutter, GlobalBatch, Texts
from pocl.training.log import peak_memory_gb
from pocl.training.on_policy import StudentTexts
from pocl.training.state import RunState
from pocl.training.student import Factors, StudentInTraining


class NotFinite(ArithmeticError):
    """A loss or gradient that is not finite, once too often: the step and the examples."""


@dataclass(frozen=True)
class StepResult:
    """What a step was, and whether it is to be the last one."""

    record: dict[str, float]  # for metrics.jsonl
    asked_to_stop: int  # the signal that any rank received; 0: none


class Stepper:
    """Makes the optimiser steps of a run, and notes them in its state."""

    def __init__(
        self,
        student: StudentInTraining,
        loss: DistillationLoss,
        batches: BatchCutter,
        student_texts: StudentTexts | None,
        state: RunState,
        max_skipped_steps: int,
    ) -> None:
        self.student, self.loss, self.batches, self.student_texts = student, loss, batches, student_texts
        self.state, self.max_skipped_steps = state, max_skipped_steps
        self.interrupt = Interrupt()

    def step(self, update: Update, following: Update | None, factors: Factors | None) -> StepResult:
        """One optimiser step; ``factors`` are those of each example, by position in the data (None: 1 for all).

        The objective is summed over response tokens and divided once by their number in the whole step, so ranks and
        micro-batches of any size give the same gradient. The ``following`` batch is prepared while a GPU computes
        this one.  Raises NotFinite for a loss or gradient that is not finite, once too often.
        """
        started, number = time.perf_counter(), self.state.position.step
        batch = self.batches.cut(self._texts(update), number)
        stage = update.stage
        objective = self.loss.named(stage.loss).objective(stage.temperature, stage.kd_ratio)
        sums = self._accumulate(batch, objective, factors)
        if following is not None and self.student_texts is None:  # the student's text depends on this step's update
            self.batches.prepare(_own_texts(following), number + 1)
        gradient_norm, applied = self.student.engine.step(update.lr)  # waits for the GPU, as nothing before it does
        parts, totals, asked_to_stop = self._over_ranks(sums)
        self._check_finite(update, batch, parts, totals, applied=applied)
        self.state.position = self.state.position.after_step(
            batch, len(update.examples), teacher_reads=self.student.teacher_reads
        )
        loss, cross_entropy, divergence = (total / batch.num_response_tokens for total in totals)
        record = {
            "loss": loss,
            "cross_entropy": cross_entropy,
            "divergence": divergence,
            "lr": update.lr,
            "gradient_norm": gradient_norm,
            "skipped": not applied,
            "student_text": batch.num_student_texts / len(update.examples),
            "tokens_per_second": batch.num_tokens / (time.perf_counter() - started),
            "peak_memory_gb": peak_memory_gb(self.student.device),
        }
        return StepResult(record, asked_to_stop)

    def _texts(self, update: Update) -> Texts:
        if self.student_texts is None:
            return _own_texts(update)
        state = self.state
        texts, state.on_policy = self.student_texts.choose(update.examples, state.position.step, state.on_policy)
        return texts

    def _accumulate(self, batch: GlobalBatch, objective: StageObjective, factors: Factors | None) -> list[Tensor]:
        """Add the gradient of a global batch -> for each micro-batch its sums [3], see ``forward_backward``."""
        sums = []
        for micro in batch.micro_batches:
            values, cross_entropy = self.student.forward_backward(micro, objective, factors, batch.num_response_tokens)
            self.state.losses.note(micro.positions, micro.of_student, micro.batch, cross_entropy)
            sums.append(values)
        return sums

    def _over_ranks(self, sums: Sequence[Tensor]) -> tuple[list[list[float]], list[float], int]:
        """(this rank's sums by micro-batch, their totals over all ranks, the signal that asked any rank to stop)."""
        parts: list[list[float]] = torch.stack(list(sums)).tolist()
        of_rank = [*map(sum, zip(*parts, strict=True)), self.interrupt.signum]
        *totals, signums = distributed.sum_over_ranks(of_rank, self.student.device)
        # Decided by the sum alone: the other ranks do not know of a signal that came since.
        return parts, totals, (self.interrupt.signum or SIGTERM) if signums else 0

    def _check_finite(
        self, update: Update, batch: GlobalBatch, parts: list[list[float]], totals: list[float], *, applied: bool
    ) -> None:
        """Count a step that was not applied.  Raises NotFinite if ``max_skipped_steps`` allows no more."""
        if not all(map(math.isfinite, totals)):
            what = f"loss is {totals[0] / batch.num_response_tokens}"
            pairs = zip(batch.micro_batches, parts, strict=True)
            bad = [micro.batch.example_ids.tolist() for micro, part in pairs if not all(map(math.isfinite, part))]
            offenders = [example_id for ids in bad for example_id in ids]
        elif not applied and not self.student.engine.scales_loss:  # the dynamic loss scale handles an fp16 overflow
            what, offenders = "gradient is not finite", self.batches.train.ids[update.examples].tolist()
        else:
            return
        position = self.state.position
        ids = sorted(distributed.gather_by_id(dict.fromkeys(offenders)))
        stage = update.stage.index + 1
        where = f"the {what} at step {position.step + 1}, stage {stage}, in the batch of examples {ids}"
        if position.skipped_steps >= self.max_skipped_steps:
            before = f" after {position.skipped_steps} skipped steps" if position.skipped_steps else ""
            raise NotFinite(f"{where}{before}")
        self.state.position = replace(position, skipped_steps=position.skipped_steps + 1)
        say(f"{where}: skipped, {self.state.position.skipped_steps} of at most {self.max_skipped_steps}")


def _own_texts(update: Update) -> Texts:
    """The examples of a step with the data's own responses."""
    return Texts(update.examples, [None] * len(update.examples))
