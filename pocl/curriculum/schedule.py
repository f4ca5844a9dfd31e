"""A run as a pure function: optimiser step -> stage, epoch, examples, temperature, KD ratio and learning rate.

The trainer, ``--plan``, the tables' counts and the integrations all read it (numpy alone).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pocl.common.errors import UserError
from pocl.curriculum.stages import CURRICULA, Curriculum, Scheme, Stage, stage_order

RelianceMode = Literal["off", "hard", "linear"]
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class CosineRate:
    """Half a cosine from ``peak`` down to ``lowest``: over each stage if it ``restarts``, else over the whole run.

    ``warmup`` steps, or this share of all of them if it is below 1, rise to the peak in equal parts before it; not
    ``decays``: the rate stays at the peak.
    """

    peak: float = 1e-4
    lowest: float = 1e-7
    restarts: bool = True  # so does the optimiser
    warmup: float = 0
    decays: bool = True

    def at(self, step: int, num_steps: int) -> float:
        """The learning rate of a step, from 0, of ``num_steps``."""
        rising = round(self.warmup * num_steps if self.warmup < 1 else min(self.warmup, num_steps))
        if step < rising:
            return self.peak * (step + 1) / (rising + 1)
        if not self.decays:
            return self.peak
        share = (step - rising) / (num_steps - rising)
        return self.lowest + 0.5 * (self.peak - self.lowest) * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Reliance:
    """Selective reliance: the KD ratio of an example follows its difficulty percentile (0 easiest, 1 hardest).

    ``off``: the stage's r for all; ``hard``: r at or above the threshold and 0 below; ``linear``: r times the
    percentile.  Source: Khan, 2023.
    """

    mode: RelianceMode = "off"
    threshold: float = 0.5

    def factors(self, num_examples: int) -> NDArray[np.float64]:
        """The factor of the KD ratio at each position of the easy-to-hard order.  -> [N]."""
        percentile = np.arange(num_examples) / max(1, num_examples - 1)
        if self.mode == "hard":
            return (percentile >= self.threshold).astype(np.float64)
        return percentile if self.mode == "linear" else np.ones(num_examples)


@dataclass(frozen=True)
class Update:
    """One optimiser step as it is planned."""

    number: int  # of the whole run, from 0
    stage: Stage
    epoch: int  # of the stage, from 0
    index: int  # of the epoch, from 0
    examples: Positions  # [G], positions in the data
    lr: float

    @property
    def restarts(self) -> bool:
        """Whether it is the first of a stage behind the first."""
        return self.stage.index > 0 and self.epoch == self.index == 0


@dataclass(frozen=True, eq=False)
class Schedule:
    """Stages over an order of N examples, in global batches of G. A last short batch of an epoch is dropped.

    ``order`` [N] holds positions in the data: what the stages' pools count along, which is the easy-to-hard order
    unless the scheme says otherwise.  Raises UserError if a stage's pool does not fill one global batch, or holds
    more examples than ``order``.
    """

    stages: Curriculum
    order: Positions
    global_batch_size: int = 64
    seed: int = 10
    rate: CosineRate = field(default_factory=CosineRate)
    scheme: Scheme = CURRICULA["baby-step"]
    reliance: Reliance = field(default_factory=Reliance)
    ranked: Positions | None = None  # [N], from the easiest to the hardest; None before there is a ranking
    weighs: bool = False  # whether a ranking gives examples weights, by their pass rates
    weights: NDArray[np.float64] | None = None  # [N], of an example's loss, by position in the data; None: 1 for all

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.pool.stop > len(self.order):
                raise UserError(
                    f"stage {stage.index + 1} wants {stage.pool.stop} examples, `order` has {len(self.order)}"
                )
            if stage.steps_per_epoch(self.global_batch_size) == 0:
                raise UserError(
                    f"stage {stage.index + 1} has {len(stage.pool)} examples, fewer than one batch of "
                    f"{self.global_batch_size}; lower `global_batch_size` or `num_stages`"
                )

    @cached_property
    def starts(self) -> list[int]:
        """The number of each stage's first step, and of all steps behind the last.  -> n + 1 numbers."""
        starts = [0]
        for stage in self.stages:
            starts.append(starts[-1] + stage.steps(self.global_batch_size))
        return starts

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.starts[-1]

    def steps_per_epoch(self, stage: Stage) -> int:
        """Optimiser steps of one epoch of a stage."""
        return stage.steps_per_epoch(self.global_batch_size)

    def place(self, number: int) -> tuple[Stage, int, int]:
        """(stage, epoch, step of the epoch) of an optimiser step.  Raises IndexError for one that the run lacks."""
        if not 0 <= number < self.total_steps:
            raise IndexError(f"step {number} of {self.total_steps}")
        stage = next(stage for stage in self.stages if number < self.starts[stage.index + 1])
        return stage, *divmod(number - self.starts[stage.index], self.steps_per_epoch(stage))

    def batches(self, stage: Stage, epoch: int) -> Positions:
        """The global batches of one epoch, of which a stage's last may be shorter.  -> [steps, G], positions in the
        data."""
        if self.scheme.shuffled_visits:
            first = self.starts[stage.index] + epoch * self.steps_per_epoch(stage)
            return self._visits[first : first + self._steps_of(stage, epoch)]
        return self._planned_batches(stage, epoch)

    def _steps_of(self, stage: Stage, epoch: int) -> int:
        """Optimiser steps of this epoch of a stage."""
        steps = self.steps_per_epoch(stage)
        return min(steps, stage.steps(self.global_batch_size) - epoch * steps)

    def _planned_batches(self, stage: Stage, epoch: int) -> Positions:
        steps, size = self._steps_of(stage, epoch), self.global_batch_size
        examples = self.order[stage_order(stage, epoch, seed=self.seed)]
        return examples[: steps * size].reshape(steps, size)

    @cached_property
    def _visits(self) -> Positions:
        """Every example as often as the stages show it, in one random order over the run.  -> [all steps, G]."""
        planned = [self._planned_batches(stage, epoch) for stage in self.stages for epoch in range(stage.epochs)]
        visits = np.concatenate(planned)
        return np.random.default_rng([self.seed, visits.size]).permutation(visits.reshape(-1)).reshape(visits.shape)

    def learning_rate(self, stage: Stage, epoch: int, index: int) -> float:
        """The learning rate of one step. A stage that ends early skips the rest of its cosine."""
        in_stage = epoch * self.steps_per_epoch(stage) + index
        if self.rate.restarts:
            return self.rate.at(in_stage, stage.steps(self.global_batch_size))
        return self.rate.at(self.starts[stage.index] + in_stage, self.total_steps)

    def epoch(self, stage: Stage, epoch: int, *, done: int = 0) -> Iterator[Update]:
        """The steps of one epoch, without the first ``done``."""
        first = self.starts[stage.index] + epoch * self.steps_per_epoch(stage)
        for i, examples in enumerate(self.batches(stage, epoch)):
            if i >= done:
                yield Update(first + i, stage, epoch, i, examples, self.learning_rate(stage, epoch, i))

    def at(self, number: int) -> Update:
        """An optimiser step, from 0.  Raises IndexError for one that the run lacks."""
        stage, epoch, index = self.place(number)
        return next(self.epoch(stage, epoch, done=index))

    def __iter__(self) -> Iterator[Update]:
        """All steps in turn."""
        for stage in self.stages:
            for epoch in range(stage.epochs):
                yield from self.epoch(stage, epoch)

    @cached_property
    def ratio_factors(self) -> NDArray[np.float64] | None:
        """What the stage's KD ratio is multiplied by, by position in the data.  -> [N], None: by 1 for all."""
        if self.reliance.mode == "off" or self.ranked is None:
            return None
        factors = np.empty(len(self.ranked))
        factors[self.ranked] = self.reliance.factors(len(self.ranked))
        return factors

    def rank(self, ranked: Positions, before: Stage | None = None) -> "Schedule":
        """The schedule under a new ranking [N], made before a stage is trained (None: before the first).

        If a curriculum leaves examples behind, those before the stage's pool keep their places.
        """
        order = self.order
        if self.scheme.order == "ranked":
            behind = order[: before.pool.start] if before and self.scheme.left_behind else order[:0]
            order = np.concatenate([behind, ranked[~np.isin(ranked, behind)]])
        return replace(self, order=order, ranked=ranked)


def unranked_order(num_examples: int, scheme: Scheme, *, seed: int) -> Positions:
    """The order before anything is ranked: shuffled once if the scheme says so, else that of the data.  -> [N]."""
    if scheme.order == "random":
        return np.random.default_rng([seed, num_examples]).permutation(num_examples)
    return np.arange(num_examples)
