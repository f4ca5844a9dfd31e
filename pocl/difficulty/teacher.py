"""The teacher's confidence: its mean cross-entropy per response token of each reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pocl.common.errors import UserError
from pocl.difficulty.measuring import Column, Request, Values

COLUMNS = {"teacher_cross_entropy": Column("the teacher's cross-entropy", "nats/token", "teacher")}
SIGNALS = {"teacher": ("teacher_cross_entropy",)}


def measure(request: Request, columns: Sequence[str]) -> Values:
    """The teacher's cross-entropy of every example; its trunk runs only if its states are not cached.

    Collective: the ranks share the work, and each gets all of it.
    """
    import torch

    from pocl.data.blocks import blocks_to_read
    from pocl.losses.chunked import chunks_needed, distillation_objective
    from pocl.losses.head import HiddenStates
    from pocl.losses.token import StageObjective

    teacher, train, chunk_tokens = request.teacher, request.train, request.settings.chunk_tokens
    if teacher is None:
        raise UserError("`signals` teacher is the teacher's confidence; give `teacher`")

    def read(block: np.ndarray) -> list[dict[str, Any]]:
        batch = train.batch(block.tolist()).to(teacher.device)
        labels, states = batch.response_labels(), HiddenStates(teacher.states(batch), teacher.head)
        num_chunks = chunks_needed(len(labels), chunk_tokens)
        result = distillation_objective(states, None, labels, StageObjective(), num_chunks=num_chunks)
        losses = batch.sum_by_example(result.cross_entropy).cpu() / batch.num_labels
        return [
            {"id": int(i), "teacher_cross_entropy": loss}
            for i, loss in zip(train.ids[block], losses.tolist(), strict=True)
        ]

    dtype = str(teacher.head.module.weight.dtype)
    with request.resumable("teacher", teacher=teacher.fingerprint, dtype=dtype) as reading, torch.no_grad():
        blocks = blocks_to_read(train.lengths, teacher.device)
        return reading.fill(blocks, train.ids, read, title="the teacher's confidence")
