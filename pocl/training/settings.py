"""How the stages are trained, as plain values, and the learning rate of each step."""

import math
from dataclasses import dataclass

from pocl.curriculum.stages import Curriculum, Stage
from pocl.losses.token import StageObjective


@dataclass(frozen=True)
class TrainSettings:
    """How the stages are trained, as plain values."""

    stages: Curriculum
    terms: tuple[StageObjective, ...]  # the objective of each stage
    global_batch_size: int
    max_tokens: int
    batch_size: int | None
    packed: bool  # the examples of a micro-batch in one row, without padding
    lr: float
    min_lr: float
    restart_optimizer: bool
    patience: int | None  # dev evaluations without a rise that end a stage early; None: nothing does
    seed: int
    eval_every: int
    log_every: int
    chunk_tokens: int
    max_new_tokens: int  # of a response that the student samples during training
    bucket_examples: int  # examples per difficulty bucket that are evaluated at each stage's end; 0: none
    keep_stages: bool  # save the student at each stage's end
    max_skipped_steps: int  # that may be skipped because a loss or gradient is not finite

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return sum(stage.steps(self.global_batch_size) for stage in self.stages)

    def learning_rate(self, stage: Stage, step_in_stage: int) -> float:
        """The learning rate of one step: a cosine over the stage, or over the whole run if nothing restarts.

        A stage that ends early skips the rest of its cosine.
        """
        if self.restart_optimizer:
            return cosine(step_in_stage, stage.steps(self.global_batch_size), self.lr, self.min_lr)
        before = sum(earlier.steps(self.global_batch_size) for earlier in self.stages[: stage.index])
        return cosine(before + step_in_stage, self.total_steps, self.lr, self.min_lr)


def cosine(step: int, num_steps: int, highest: float, lowest: float) -> float:
    """Half a cosine from ``highest`` at step 0 down to ``lowest`` at ``num_steps``."""
    return lowest + 0.5 * (highest - lowest) * (1.0 + math.cos(math.pi * step / num_steps))
