"""Cross-entropy and divergence over response tokens, from hidden states and heads, in chunks, with their gradient.

Only one chunk's logits exist at a time: each chunk's gradient is computed in the forward pass, analytically w.r.t. the
logits, before the next chunk. The backward pass then only returns these gradients, so no logits are stored or
computed twice, and peak memory does not grow with tokens times vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pocl.losses.fused import fused_objective
from pocl.losses.head import Head, aligned
from pocl.losses.token import StageObjective, Weights, token_objective

# Logit elements processed per block. On the CPU, what its caches hold: at V = 50,257 ten rows at a time took two
# thirds to three quarters of the time that 256 took. A GPU needs long kernels (not measured yet).
BLOCK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 24}
# float32 tensors of a block's size that are alive at the peak (counted: 11 to 15, depending on the divergence).
_TENSORS_PER_BLOCK = 15
_LARGEST_CHUNK = {"cpu": 128, "cuda": 4096}  # CPU: with 192 a step was 1 to 6 % faster, but took more memory
_SHARE_OF_MEMORY = 1 / 16


@dataclass(frozen=True)
class Objective:
    """What one micro-batch contributes: a sum to differentiate, and one value per response token to report."""

    loss: Tensor  # [], the sum over tokens of (1 - r) CE + r T^k D
    cross_entropy: Tensor  # [N], nats, at T = 1, detached
    divergence: Tensor  # [N], nats, at T, before T^k, detached; zeros without a teacher


def distillation_objective(
    student_states: Tensor,
    student_head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor,
    *,
    term: StageObjective,
    weights: Weights | None = None,
    num_chunks: int = 1,
    fused: bool = False,
) -> Objective:
    """The objective of N response tokens, summed.  [N, H_s], [N, H_t], [N] -> Objective.

    ``weights`` [N] are per token and replace the objective's. ``fused``: if gradients are enabled, use the GPU kernel.

    The tokens are cut into ``num_chunks`` equal parts whose logits exist one after the other. If gradients are
    enabled, ``loss`` carries those w.r.t. the states and the head's parameters, and can be differentiated once.
    The caller divides ``loss`` once by the number of response tokens in the whole optimiser step.
    Source: POCL, arXiv 2506.05695, section 3.  Raises ValueError if the numbers of rows differ.
    """
    num_tokens = _check_rows(student_states, teacher_states, labels)
    learns = torch.is_grad_enabled()
    parameters = student_head.trained_parameters() if learns else []
    head = aligned(student_head)
    parameter_gradients = _unfilled_gradients(student_head, head, student_states, num_chunks) if learns else []

    def chunk(piece: slice) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """(objective, cross-entropy, divergence) of some tokens, and their gradient w.r.t. the states."""
        rows = student_states[piece].detach().requires_grad_(learns)
        with _frozen(parameters):  # their gradients are summed below, without another tensor of the head's size
            product = head.module(rows)
        student_logits = head.logits(product)
        known = None if weights is None else weights[piece]
        with torch.no_grad():
            no_teacher = teacher_states is None or teacher_head is None
            teacher_logits = None if no_teacher else teacher_head(teacher_states[piece])
            # In place: the gradient overwrites the logits.
            parts = (student_logits.detach(), teacher_logits, labels[piece], term, known)
            values = fused_objective(*parts) if fused and learns else _in_blocks(*parts, learns=learns)
        if not learns:
            return values, None
        del teacher_logits
        by_rows, by_product = _back_to_rows(head, rows, product, student_logits)
        _add_up(parameter_gradients, rows.detach(), by_product, first=piece.start == 0)
        return values, by_rows

    values, state_gradients = [], []
    for i in range(num_chunks):
        chunk_values, by_states = chunk(slice(num_tokens * i // num_chunks, num_tokens * (i + 1) // num_chunks))
        values.append(chunk_values)
        state_gradients.append(by_states)
    losses, cross_entropies, divergences = (torch.cat(column) for column in zip(*values, strict=True))
    loss = losses.sum()
    if learns:
        num_rows = student_head.module.out_features
        known = [torch.cat(state_gradients), *(gradient[:num_rows] for gradient in parameter_gradients)]
        loss = _WithGradient.apply(loss, known, student_states, *parameters)
    return Objective(loss, cross_entropies, divergences)


def _check_rows(student_states: Tensor, teacher_states: Tensor | None, labels: Tensor) -> int:
    num_tokens = labels.shape[0]
    if student_states.shape[0] != num_tokens or (teacher_states is not None and teacher_states.shape[0] != num_tokens):
        teacher_tokens = num_tokens if teacher_states is None else teacher_states.shape[0]
        raise ValueError(
            f"{student_states.shape[0]} student states, {teacher_tokens} teacher states and {num_tokens} labels; "
            f"expected one of each per response token"
        )
    return num_tokens


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Make autograd treat them as constants: under ZeRO-3 a matmul computes their gradients, needed or not."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _unfilled_gradients(head: Head, aligned_head: Head, states: Tensor, num_chunks: int) -> list[Tensor]:
    """Empty gradients w.r.t. the head's trainable parameters, weight [V, H] and bias [V], V as aligned.

    Allocated before any logits, whose memory the next chunk's can then reuse. If chunks are summed, in float32 at
    least, since bfloat16 would lose small addends.
    """
    num_rows, width = aligned_head.module.out_features, aligned_head.module.in_features
    dtype = torch.promote_types(states.dtype, torch.float32) if num_chunks > 1 else states.dtype
    shapes = {id(head.module.weight): (num_rows, width), id(head.module.bias): (num_rows,)}
    return [states.new_empty(shapes[id(parameter)], dtype=dtype) for parameter in head.trained_parameters()]


def _back_to_rows(head: Head, rows: Tensor, product: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients w.r.t. the head's input [n, H] and its module's output [n, V], from that w.r.t. the logits, which
    ``logits`` holds.
    """
    if not head.only_cuts:
        by_rows, by_product = torch.autograd.grad(logits, (rows, product), logits.detach())
        return by_rows, by_product
    by_product = product.detach()
    by_product[:, logits.shape[1] :].zero_()
    (by_rows,) = torch.autograd.grad(product, rows, by_product)
    return by_rows, by_product


def _add_up(totals: Sequence[Tensor], rows: Tensor, gradient: Tensor, *, first: bool) -> None:
    """Add a chunk's part to the gradients w.r.t. the head's parameters; the ``first`` one overwrites what they hold.

    ``rows`` [n, H] is the head's input, ``gradient`` [n, V] is w.r.t. its output.
    """
    for total in totals:
        if total.dim() == 2 and total.dtype == gradient.dtype:
            total.addmm_(gradient.t(), rows, beta=0 if first else 1)
            continue
        part = gradient.t() @ rows if total.dim() == 2 else gradient.sum(0, dtype=total.dtype)
        total.copy_(part) if first else total.add_(part)


class _WithGradient(torch.autograd.Function):
    """A sum whose gradients w.r.t. its inputs are already known: the backward pass scales and returns them, once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In place, and released: the head's gradient is as large as the head.
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, *(g.mul_(factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))


def _in_blocks(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    term: StageObjective,
    weights: Weights | None,
    *,
    learns: bool,
) -> tuple[Tensor, ...]:
    """``token_objective``, some rows at a time -> its three values for all; its gradient overwrites the logits.

    [N, V], [N, V], [N], [N] -> 3 x [N].
    """
    num_rows = max(1, BLOCK_NUMBERS[student_logits.device.type] // student_logits.shape[1])
    blocks = []
    for start in range(0, max(1, len(labels)), num_rows):
        block = slice(start, start + num_rows)
        *values, gradient = token_objective(
            student_logits[block],
            None if teacher_logits is None else teacher_logits[block],
            labels[block],
            term,
            None if weights is None else weights[block],
            learns=learns,
        )
        if gradient is not None:
            student_logits[block] = gradient
        blocks.append(values)
    return tuple(torch.cat(column) for column in zip(*blocks, strict=True))


def chunk_bytes(chunk_tokens: int, vocab_size: int, device_type: str) -> int:
    """The memory that a chunk takes at its peak: student's and teacher's logits and a block [bytes]."""
    block = min(max(BLOCK_NUMBERS[device_type], vocab_size), chunk_tokens * vocab_size)
    return 4 * (2 * chunk_tokens * vocab_size + _TENSORS_PER_BLOCK * block)


def automatic_chunk_tokens(vocab_size: int, memory: int, device_type: str) -> int:
    """The default size of a chunk: the largest, halved until it fits a sixteenth of ``memory`` [bytes].

    A pure function of the machine and the vocabulary, so that a resumed run computes the same.
    """
    chunk_tokens = _LARGEST_CHUNK[device_type]
    while chunk_tokens > 1 and chunk_bytes(chunk_tokens, vocab_size, device_type) > memory * _SHARE_OF_MEMORY:
        chunk_tokens //= 2
    return chunk_tokens


def chunks_needed(num_tokens: int, chunk_tokens: int) -> int:
    """The number of chunks of at most ``chunk_tokens`` tokens, at least one."""
    return max(1, -(-num_tokens // chunk_tokens))
