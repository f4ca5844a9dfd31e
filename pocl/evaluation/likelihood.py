"""Cross-entropy of references under a student."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from pocl.common import distributed
from pocl.data.batch import Batch, collate
from pocl.data.blocks import blocks_to_read
from pocl.data.dataset import Split
from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective
from pocl.models.student import Student


@torch.no_grad()
def example_cross_entropy(student: Student, batch: Batch, *, chunk_tokens: int) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, response tokens) of each example of a batch on the student's device."""
    labels, states = batch.response_labels(), HiddenStates(student.states(batch), student.head)
    num_chunks = chunks_needed(len(labels), chunk_tokens)
    result = distillation_objective(states, None, labels, StageObjective(), num_chunks=num_chunks)
    sums = batch.sum_by_example(result.cross_entropy)
    return list(zip(sums.tolist(), batch.num_labels.tolist(), strict=True))


def mean_cross_entropy(student: Student, split: Split, *, chunk_tokens: int) -> float:
    """Mean cross-entropy per response token of a split, in nats, over all ranks."""
    return _mean(student, split.lengths, split.batch, chunk_tokens)


def cross_entropy_of_references(
    student: Student,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    *,
    max_length: int,
    chunk_tokens: int,
) -> float:
    """Mean cross-entropy per token of references behind their prompts, in nats, over all ranks.

    References are tokens with the one that ends them; both together are cut to ``max_length``.
    """

    def batch_of(rows: list[int]) -> Batch:
        return collate(rows, [prompts[i] for i in rows], [references[i] for i in rows], max_length=max_length)

    totals = [len(prompt) + len(reference) for prompt, reference in zip(prompts, references, strict=True)]
    return _mean(student, np.minimum(totals, max_length) - 1, batch_of, chunk_tokens)


def _mean(student: Student, lengths: np.ndarray, batch_of: Callable[[list[int]], Batch], chunk_tokens: int) -> float:
    was_training, device = student.model.training, student.device
    student.model.train(False)
    total, count = 0.0, 0
    for block in distributed.my_share(blocks_to_read(lengths, device)):
        batch = batch_of(block.tolist()).to(device)
        for loss, tokens in example_cross_entropy(student, batch, chunk_tokens=chunk_tokens):
            total, count = total + loss, count + tokens
    student.model.train(was_training)
    total_loss, num_tokens = distributed.sum_over_ranks([total, count], device)
    return total_loss / num_tokens
