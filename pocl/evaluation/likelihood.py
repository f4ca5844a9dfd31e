"""Cross-entropy of references under a model."""

import torch
from transformers import PreTrainedModel

from pocl.common import distributed
from pocl.data.batch import Batch
from pocl.data.blocks import blocks_to_read
from pocl.data.dataset import Split
from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective
from pocl.models.states import make_head, response_states


@torch.no_grad()
def example_cross_entropy(
    model: PreTrainedModel, batch: Batch, *, chunk_tokens: int, vocab_size: int
) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, response tokens) of each example of a batch, over ``vocab_size`` entries."""
    head, labels = make_head(model, vocab_size), batch.response_labels()
    num_chunks = chunks_needed(len(labels), chunk_tokens)
    states = HiddenStates(response_states(model, batch), head)
    result = distillation_objective(states, None, labels, StageObjective(), num_chunks=num_chunks)
    sums = batch.sum_by_example(result.cross_entropy)
    return list(zip(sums.tolist(), batch.num_labels.tolist(), strict=True))


def mean_cross_entropy(model: PreTrainedModel, split: Split, *, chunk_tokens: int, vocab_size: int) -> float:
    """Mean cross-entropy per response token of a split, in nats, over all ranks; see ``example_cross_entropy``."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = 0.0, 0
    for block in distributed.my_share(blocks_to_read(split.lengths, device)):
        batch = split.batch(block.tolist()).to(device)
        for loss, tokens in example_cross_entropy(model, batch, chunk_tokens=chunk_tokens, vocab_size=vocab_size):
            total, count = total + loss, count + tokens
    model.train(was_training)
    total_loss, num_tokens = distributed.sum_over_ranks([total, count], device)
    return total_loss / num_tokens
