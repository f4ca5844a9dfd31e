"""The student in training: its states, its head and the objective as one module."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl.common import distributed
from pocl.data.batch import Batch, send
from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.head import Head, HiddenStates
from pocl.losses.token import StageObjective, Weights
from pocl.models.states import make_head, response_labels, response_states


class StudentObjective(nn.Module):
    """Student and objective as one module, so that one forward call of the training engine does both.

    ``sharded``, set by the engine, means that the head's weight is gathered from all ranks at every call (ZeRO-3): all
    ranks then agree on the number of chunks, since a call that one rank makes alone would hang.
    """

    sharded = False

    def __init__(
        self, student: PreTrainedModel, *, chunk_tokens: int, vocab_size: int | None = None, fused: bool = False
    ) -> None:
        super().__init__()
        self.student, self.chunk_tokens, self.fused = student, chunk_tokens, fused
        self.head = make_head(student, vocab_size)

    def forward(
        self,
        batch: Batch,
        term: StageObjective,
        teacher_states: Tensor | None = None,
        teacher_head: Head | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss [], cross-entropy [N], divergence [N]) of a micro-batch; see ``LossValues``.

        ``weights`` [B] are per example and replace the term's.
        """
        labels = response_labels(batch)
        num_chunks = chunks_needed(len(labels), self.chunk_tokens)
        if self.sharded:
            num_chunks = distributed.max_over_ranks(num_chunks, labels.device)
        if weights is not None:
            counts = send(batch.num_labels, labels.device)
            parts = (weights.divergence, weights.cross_entropy)
            weights = Weights(*(part.repeat_interleave(counts, output_size=len(labels)) for part in parts))
        teacher = None
        if teacher_states is not None and teacher_head is not None:
            teacher = HiddenStates(teacher_states, teacher_head)
        result = distillation_objective(
            HiddenStates(response_states(self.student, batch), self.head),
            teacher,
            labels,
            term,
            weights=weights,
            num_chunks=num_chunks,
            fused=self.fused,
        )
        return result.loss, result.cross_entropy, result.divergence
