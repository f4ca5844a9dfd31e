"""The gradient of a weight that is embedding and head at once, in one tensor of its size.

Autograd makes two, the head's and that of the lookup, which is zero but for the rows of the tokens that were read, and
adds them up. Here the rows are added to the head's gradient where it lies. On the CPU that was worth a twentieth of a
training step (student of 16M, vocabulary of 50,257).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class TiedGradient:
    """The gradient of one forward pass by a tied ``weight`` [V, H]: the head's part, then the rows on top of it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.of_head: Tensor | None = None

    def take(self) -> Tensor:
        """The head's part, in float32 at least, where bfloat16 would swallow addends; it is let go of here."""
        total, self.of_head = self.of_head, None
        if total is None:
            raise RuntimeError("the backward pass of the embedding came before that of the head it is tied to")
        return total.to(torch.promote_types(total.dtype, torch.float32))


class _Lookup(torch.autograd.Function):
    """Embeddings whose backward pass gives the whole gradient of the tied weight, the head's part included."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, embeddings: Tensor, ids: Tensor, padding_id: int | None, tied: TiedGradient
    ) -> Tensor:
        ctx.ids, ctx.padding_id, ctx.tied, ctx.dtype = ids, padding_id, tied, weight.dtype
        return embeddings

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, ids = ctx.tied.take(), ctx.ids.flatten()
        rows = gradient.reshape(len(ids), -1).to(total.dtype)
        if ctx.padding_id is not None:  # that row does not learn from lookups
            rows = rows.masked_fill((ids == ctx.padding_id)[:, None], 0.0)
        if total.is_cuda:  # sorted there, and so the same every time
            total.index_put_((ids,), rows, accumulate=True)
        else:
            total.index_add_(0, ids, rows)
        return total.to(ctx.dtype), None, None, None, None


def tied_embedding(embedding: nn.Module, head: nn.Linear) -> nn.Embedding | None:
    """The embedding where its lookups can be added to the head's gradient; None where it is not tied, or does more."""
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    plain = plain and not embedding.scale_grad_by_freq and not embedding.sparse
    return embedding if plain and embedding.weight is head.weight else None


@contextmanager
def lookups_of(embedding: nn.Embedding | None) -> Iterator[TiedGradient | None]:
    """Have the embedding's first lookup within the block give its gradient to what is yielded.

    None where there is no such embedding, or nothing to learn. Whoever computes the head's gradient leaves it in
    ``of_head``, before the backward pass comes to the lookup.
    """
    if embedding is None or not (torch.is_grad_enabled() and embedding.weight.requires_grad):
        yield None
        return
    tied = TiedGradient(embedding.weight)
    seen = []

    def look_up(module: nn.Embedding, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if seen:  # autograd's own way
            return None
        seen.append(True)
        return _Lookup.apply(module.weight, output.detach(), inputs[0], module.padding_idx, tied)

    hook = embedding.register_forward_hook(look_up)
    try:
        yield tied
    finally:
        hook.remove()
