"""The teacher as a source of hidden states at response positions, and a head that turns them into logits.

Whatever the source, the objective sees the same two things; a cache of states can stand here instead of the model.
"""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.data import Batch
from pocl.models import Head, make_head, response_states


class TeacherSource(Protocol):
    """What the training step asks of a teacher."""

    head: Head

    def states(self, batch: Batch) -> Tensor:
        """The hidden states behind the last norm at the batch's response positions, in order.  -> [N, H]."""
        ...


class OnlineTeacher:
    """The teacher model itself, frozen, run on every batch."""

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head: Head = make_head(model, vocab_size)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """See TeacherSource."""
        return response_states(self.model, batch)
