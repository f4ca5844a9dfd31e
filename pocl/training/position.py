"""How far a run has got, and what it has seen: the whole resume state except tensors (pure)."""

from dataclasses import dataclass, replace


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

    def after_step(
        self, samples: int, *, tokens: int, response_tokens: int, student_texts: int, teacher_reads: bool
    ) -> "Position":
        """The position after one optimiser step on ``samples`` examples."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            response_tokens=self.response_tokens + response_tokens,
            teacher_forward_passes=self.teacher_forward_passes + (samples if teacher_reads else 0),
            student_texts=self.student_texts + student_texts,
        )

    def after_dev(self, rouge_l: float) -> "Position":
        """The position after a dev evaluation, with the stage's best score and count updated."""
        if self.stage_best_rouge_l is None or rouge_l > self.stage_best_rouge_l:
            return replace(self, stage_best_rouge_l=rouge_l, evaluations_without_rise=0)
        return replace(self, evaluations_without_rise=self.evaluations_without_rise + 1)

    def after_epoch(self, stage: int, epoch: int, *, stage_over: bool, last_stage: bool) -> "Position":
        """The position after an epoch of a stage."""
        if not stage_over:
            return replace(self, stage=stage, epoch=epoch + 1, step_in_epoch=0)
        fresh = replace(
            self, stage=stage + 1, epoch=0, step_in_epoch=0, stage_best_rouge_l=None, evaluations_without_rise=0
        )
        return replace(fresh, done=last_stage)
