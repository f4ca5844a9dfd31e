"""Student and objective as one torch module: what the engine runs."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl.common import distributed
from pocl.data.batch import Batch, send
from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.head import Head, HiddenStates
from pocl.losses.token import StageObjective, Weights
from pocl.models.states import response_states


class StudentObjective(nn.Module):
    """Student and objective as one module, so that one forward call of the training engine does both.

    ``sharded``, set by the engine, means that the head's weight is gathered from all ranks at every call (ZeRO-3): all
    ranks then agree on the number of chunks, since a call that one rank makes alone would hang.
    """

    sharded = False

    def __init__(self, model: PreTrainedModel, head: Head, *, chunk_tokens: int, fused: bool = False) -> None:
        super().__init__()
        self.student, self.head, self.chunk_tokens, self.fused = model, head, chunk_tokens, fused

    def forward(
        self,
        batch: Batch,
        objective: StageObjective,
        teacher: HiddenStates | None = None,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of ``LossValues`` of a micro-batch; ``weights`` [B] replace the stage's r.

        A tuple, whose tensors the engine finds.
        """
        labels = batch.response_labels()
        num_chunks = chunks_needed(len(labels), self.chunk_tokens)
        if self.sharded:
            num_chunks = distributed.max_over_ranks(num_chunks, labels.device)
        if weights is not None:
            weights = _by_token(weights, batch, labels)
        values = distillation_objective(
            HiddenStates(response_states(self.student, batch), self.head),
            teacher,
            labels,
            objective,
            weights=weights,
            num_chunks=num_chunks,
            fused=self.fused,
        )
        return values.loss, values.cross_entropy, values.divergence


def _by_token(weights: Weights, batch: Batch, labels: Tensor) -> Weights:
    """Weights of each example [B] as those of each response token [N]."""
    counts = send(batch.num_labels, labels.device)
    parts = (weights.divergence, weights.cross_entropy)
    return Weights(*(part.repeat_interleave(counts, output_size=len(labels)) for part in parts))
