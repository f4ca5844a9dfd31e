"""What a run feeds through the student, counted from the lengths of its examples."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from pocl.curriculum.schedule import Schedule
from pocl.curriculum.stages import Stage
from pocl.data.dataset import Split
from pocl.data.micro_batches import MicroBatchLimits, micro_batches

_CUT_STEPS = 500  # steps of a stage's first epoch that are cut into micro-batches; the rest are like them
Shape = tuple[int, int]  # examples of a micro-batch, tokens of its longest


@dataclass(frozen=True)
class Workload:
    """What the student reads, over all ranks."""

    steps: int
    samples: int
    tokens: int  # without padding, as ledger.json counts them
    response_tokens: int
    padded_tokens: float
    largest: tuple[Shape, ...]  # micro-batches: the one with most tokens, and the one with most pairs of tokens


def count_workload(schedule: Schedule, split: Split, limits: MicroBatchLimits, *, num_ranks: int) -> Workload:
    """The workload of a schedule.

    Padding is counted in steps spread over the first epoch of each stage, on the first rank: the others' is about the
    same. Packed micro-batches have none.
    """
    return total(_count_stage(schedule, stage, split, limits, num_ranks) for stage in schedule.stages)


def _count_stage(schedule: Schedule, stage: Stage, split: Split, limits: MicroBatchLimits, num_ranks: int) -> Workload:
    tokens = response_tokens = 0
    for epoch in range(stage.epochs):
        seen = schedule.batches(stage, epoch)  # [steps, G]
        tokens += int(split.lengths[seen].sum())
        response_tokens += int(split.num_labels[seen].sum())
    steps, first = stage.steps(schedule.global_batch_size), schedule.batches(stage, 0)
    chosen = np.unique(np.linspace(0, len(first) - 1, min(len(first), _CUT_STEPS)).astype(int))
    cuts = [
        split.lengths[rows]
        for batch in first[chosen]
        for rows in micro_batches(batch, split.lengths, limits, rank=0, world_size=num_ranks)
    ]
    shapes = [_shape(lengths, packed=limits.packed) for lengths in cuts]
    padded = num_ranks * steps / len(chosen) * sum(rows * length for rows, length in shapes)
    return Workload(
        steps=steps,
        samples=steps * schedule.global_batch_size,
        tokens=tokens,
        response_tokens=response_tokens,
        padded_tokens=float(tokens) if limits.packed else padded,
        largest=_largest(shapes),
    )


def _shape(lengths: np.ndarray, *, packed: bool) -> Shape:
    """The shape of a micro-batch; of a packed one as many rows of its longest example as hold all tokens."""
    longest = int(lengths.max())
    return math.ceil(lengths.sum() / longest) if packed else len(lengths), longest


def _largest(shapes: Collection[Shape]) -> tuple[Shape, ...]:
    tokens = max(shapes, key=lambda shape: shape[0] * shape[1])
    pairs = max(shapes, key=lambda shape: shape[0] * shape[1] ** 2)
    return tuple(dict.fromkeys((tokens, pairs)))


def total(workloads: Iterable[Workload]) -> Workload:
    """All of them together."""
    workloads = list(workloads)
    return Workload(
        steps=sum(one.steps for one in workloads),
        samples=sum(one.samples for one in workloads),
        tokens=sum(one.tokens for one in workloads),
        response_tokens=sum(one.response_tokens for one in workloads),
        padded_tokens=sum(one.padded_tokens for one in workloads),
        largest=_largest([shape for one in workloads for shape in one.largest]),
    )
