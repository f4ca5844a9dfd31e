"""How far a run has got, and what it has seen: the whole resume state except tensors (pure)."""

from dataclasses import dataclass, replace

from pocl.curriculum.stages import Stage
from pocl.training.batches import GlobalBatch


@dataclass(frozen=True)
class Position:
    """The epoch to resume with, the best dev score, and counts over all ranks."""

    stage: int = 0
    epoch: int = 0
    step_in_epoch: int = 0  # optimiser steps of that epoch already done
    step: int = 0  # of the whole run
    best_rouge_l: float | None = None  # on dev, of the whole run
    stage_best_rouge_l: float | None = None  # of the current stage
    evaluations_without_rise: int = 0  # dev evaluations since then
    samples: int = 0
    tokens: int = 0  # the student's inputs, without padding
    response_tokens: int = 0
    teacher_forward_passes: int = 0  # examples that the teacher's trunk has read
    student_texts: int = 0  # samples whose response the student wrote
    skipped_steps: int = 0  # steps whose loss or gradient was not finite
    done: bool = False

    def after_step(self, batch: GlobalBatch, samples: int, *, teacher_reads: bool) -> "Position":
        """The position after one optimiser step on ``samples`` examples; ``teacher_reads``: its trunk read them."""
        return replace(
            self,
            step=self.step + 1,
            step_in_epoch=self.step_in_epoch + 1,
            samples=self.samples + samples,
            tokens=self.tokens + batch.num_tokens,
            response_tokens=self.response_tokens + batch.num_response_tokens,
            teacher_forward_passes=self.teacher_forward_passes + (samples if teacher_reads else 0),
            student_texts=self.student_texts + batch.num_student_texts,
        )

    def after_skip(self) -> "Position":
        """The position after a step that was left out."""
        return replace(self, skipped_steps=self.skipped_steps + 1)

    def with_best(self, rouge_l: float | None) -> "Position":
        """The position with the dev ROUGE-L of the student in best/; None where there is no dev set."""
        return replace(self, best_rouge_l=rouge_l)

    def _after_dev(self, rouge_l: float) -> "Position":
        if self.stage_best_rouge_l is None or rouge_l > self.stage_best_rouge_l:
            return replace(self, stage_best_rouge_l=rouge_l, evaluations_without_rise=0)
        return replace(self, evaluations_without_rise=self.evaluations_without_rise + 1)

    def _next_epoch(self) -> "Position":
        return replace(self, epoch=self.epoch + 1, step_in_epoch=0)

    def _next_stage(self, *, done: bool) -> "Position":
        return replace(
            self,
            stage=self.stage + 1,
            epoch=0,
            step_in_epoch=0,
            stage_best_rouge_l=None,
            evaluations_without_rise=0,
            done=done,
        )


@dataclass(frozen=True)
class EpochEnd:
    """What the end of an epoch leads to."""

    position: Position  # where the run goes on
    stage_over: bool
    converged: bool  # it is over before its last epoch: dev ROUGE-L does not rise any more
    is_best: bool  # the student is to be kept: the best on dev so far, or the newest where there is no dev set


def is_due(stage: Stage, epoch: int, every: int) -> bool:
    """Whether an epoch, from 0, ends with a dev evaluation and a checkpoint."""
    return epoch == stage.epochs - 1 or (epoch + 1) % every == 0


def after_epoch(
    position: Position, stage: Stage, rouge_l: float | None, *, patience: int | None, last_stage: bool
) -> EpochEnd:
    """What follows an epoch of ``stage`` that the position stands in.

    ``rouge_l`` is that of a dev evaluation, None without one; ``patience`` the evaluations without a rise that end a
    stage, None: nothing does.
    """
    last = position.epoch == stage.epochs - 1
    if rouge_l is not None:
        position = position._after_dev(rouge_l)
    without_rise = patience is not None and position.evaluations_without_rise >= patience
    over, before = last or without_rise, position.best_rouge_l
    is_best = rouge_l is None or before is None or rouge_l > before
    position = position._next_stage(done=last_stage) if over else position._next_epoch()
    return EpochEnd(position, over, without_rise and not last, is_best)
