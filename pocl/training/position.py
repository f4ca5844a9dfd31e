"""How far a run has got, and what it has seen: the whole resume state except tensors (pure)."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from pocl.curriculum.stages import Stage
from pocl.training.batches import GlobalBatch


@dataclass(frozen=True)
class Position:
    """The epoch to resume with, the best dev score, and counts over all ranks."""

    stage: int = 0
    epoch: int = 0
    step_in_epoch: int = 0  # optimiser steps of that epoch already done
    step: int = 0  # of the whole run
    best_score: float | None = None  # on dev, of the whole run, by the metric that selects: ROUGE-L by default
    best_cross_entropy: float | None = None  # on dev, of the same student [nats per token]
    stage_best_score: float | None = None  # of the current stage
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

    def with_best(self, dev: "DevScores | None") -> "Position":
        """The position with the dev scores of the student in best/; None where there is no dev set."""
        if dev is None:
            return replace(self, best_score=None, best_cross_entropy=None)
        return replace(self, best_score=dev.score, best_cross_entropy=dev.cross_entropy)

    def is_beaten_by(self, dev: "DevScores") -> bool:
        """Whether these dev scores are better than the best so far; where those are equal, by cross-entropy."""
        if self.best_score is None or self.best_cross_entropy is None:
            return True
        if dev.score == self.best_score:
            return dev.cross_entropy < self.best_cross_entropy
        return dev.score > self.best_score

    def _after_dev(self, score: float) -> "Position":
        if self.stage_best_score is None or score > self.stage_best_score:
            return replace(self, stage_best_score=score, evaluations_without_rise=0)
        return replace(self, evaluations_without_rise=self.evaluations_without_rise + 1)

    def _next_stage(self, *, done: bool) -> "Position":
        return replace(
            self,
            stage=self.stage + 1,
            epoch=0,
            step_in_epoch=0,
            stage_best_score=None,
            evaluations_without_rise=0,
            done=done,
        )


class DevScores(NamedTuple):
    """What a dev evaluation found."""

    score: float  # 0 to 100, by the metric that selects
    cross_entropy: float  # of the references [nats per token]


@dataclass(frozen=True)
class EpochEnd:
    """What the end of an epoch leads to."""

    position: Position  # where the run goes on
    stage_over: bool
    converged: bool  # it is over before its last epoch: the dev score does not rise any more
    is_best: bool  # the student is to be kept: the best on dev so far, or the newest where there is no dev set


def is_due(stage: Stage, epoch: int, every: int) -> bool:
    """Whether an epoch, from 0, ends with a dev evaluation and a checkpoint."""
    return epoch == stage.epochs - 1 or (epoch + 1) % every == 0


def after_epoch(
    position: Position, stage: Stage, dev: DevScores | None, *, patience: int | None, last_stage: bool
) -> EpochEnd:
    """What follows an epoch of ``stage`` that the position stands in.

    ``dev`` is what a dev evaluation found, None without one; ``patience`` the evaluations without a rise
    that end a stage, None: nothing does.
    """
    last = position.epoch == stage.epochs - 1
    is_best = dev is None or position.is_beaten_by(dev)
    if dev is not None:
        position = position._after_dev(dev.score)
    without_rise = patience is not None and position.evaluations_without_rise >= patience
    over = last or without_rise
    if over:
        position = position._next_stage(done=last_stage)
    else:
        position = replace(position, epoch=position.epoch + 1, step_in_epoch=0)
    return EpochEnd(position, over, without_rise and not last, is_best)
