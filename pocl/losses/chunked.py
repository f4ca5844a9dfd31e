"""Cross-entropy and divergence over response tokens, from hidden states and heads, in chunks, with their gradient.

Only one chunk's logits exist at a time: each chunk's gradient is computed in the forward pass, analytically w.r.t. the
logits, before the next chunk. The backward pass then only returns these gradients, so no logits are stored or
computed twice, and peak memory does not grow with tokens times vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pocl.losses.fused import fused_objective
from pocl.losses.head import Head, HiddenStates, aligned
from pocl.losses.token import StageObjective, Weights, token_objective

# Logit elements processed per block. On the CPU, what its caches hold: at V = 50,257 ten rows at a time took two
# thirds to three quarters of the time that 256 took. A GPU needs long kernels (not measured yet).
BLOCK_NUMBERS = {"cpu": 1 << 19, "cuda": 1 << 24}
# float32 tensors of a block's size that are alive at the peak (counted: 11 to 15, depending on the divergence).
_TENSORS_PER_BLOCK = 15
_LARGEST_CHUNK = {"cpu": 128, "cuda": 4096}  # CPU: with 192 a step was 1 to 6 % faster, but took more memory
_SHARE_OF_MEMORY = 1 / 16

Values = tuple[Tensor, Tensor, Tensor]  # loss, cross-entropy and divergence of each token, 3 x [N]


@dataclass(frozen=True)
class LossValues:
    """What one micro-batch contributes: a sum to differentiate, and one value per response token to report."""

    loss: Tensor  # [], the sum over tokens of (1 - r) CE + r T^k D
    cross_entropy: Tensor  # [N], nats, at T = 1, detached
    divergence: Tensor  # [N], nats, at T, before T^k, detached; zeros without a teacher


def distillation_objective(
    student: HiddenStates,
    teacher: HiddenStates | None,
    labels: Tensor,
    objective: StageObjective,
    *,
    weights: Weights | None = None,
    num_chunks: int = 1,
    fused: bool = False,
) -> LossValues:
    """The objective of N response tokens, summed.  [N, H_s], [N, H_t], [N] -> [], [N], [N].

    ``weights`` [N] are per token and replace the objective's. ``fused``: if gradients are enabled, use the GPU kernel.

    The tokens are cut into ``num_chunks`` equal parts whose logits exist one after the other. If gradients are
    enabled, ``loss`` carries those w.r.t. the states and the head's parameters, and can be differentiated once.
    The caller divides ``loss`` once by the number of response tokens in the whole optimiser step.
    Source: POCL, arXiv 2506.05695, section 3.  Raises ValueError if numbers of rows or vocabularies differ.
    """
    _check(student, teacher, labels)
    ends = [len(labels) * i // num_chunks for i in range(num_chunks + 1)]
    chunks = [_Chunk(slice(*pair), teacher, labels, objective, weights) for pair in pairwise(ends)]
    return _with_gradient(student, chunks, fused=fused) if torch.is_grad_enabled() else _values_alone(student, chunks)


def logits_objective(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    objective: StageObjective,
    weights: Weights | None = None,
) -> LossValues:
    """``distillation_objective`` where the logits exist already.  [N, V], [N, V], [N] -> [], [N], [N].

    If they require a gradient, ``loss`` carries it w.r.t. the student's, and can be differentiated once.
    """
    learns = torch.is_grad_enabled() and student_logits.requires_grad
    logits = student_logits.detach().clone() if learns else student_logits  # becomes the gradient
    losses, cross_entropies, divergences = _in_blocks(
        logits, teacher_logits, labels, objective, weights, learns=learns
    )
    loss = _with_known_gradient(losses.sum(), [logits], student_logits) if learns else losses.sum()
    return LossValues(loss, cross_entropies, divergences)


def _check(student: HiddenStates, teacher: HiddenStates | None, labels: Tensor) -> None:
    teacher_rows = len(labels) if teacher is None else len(teacher)
    if not len(student) == teacher_rows == len(labels):
        raise ValueError(
            f"{len(student)} student states, {teacher_rows} teacher states and {len(labels)} labels; "
            f"expected one of each per response token"
        )
    if teacher is not None and teacher.head.num_logits != student.head.num_logits:
        raise ValueError(
            f"the student's head gives {student.head.num_logits} logits, the teacher's {teacher.head.num_logits}; cut "
            f"both to the tokenizer's size by `vocab_size`"
        )


@dataclass(frozen=True)
class _Chunk:
    """Some of the response tokens, ``rows`` of them all, and what the student's logits are compared with there."""

    rows: slice
    teacher: HiddenStates | None  # this and the next two are of all tokens
    labels: Tensor
    objective: StageObjective
    weights: Weights | None

    @torch.no_grad()
    def values(self, student_logits: Tensor, *, learns: bool, fused: bool = False) -> Values:
        """The values of these tokens; if it ``learns``, the loss's gradient overwrites the student's logits [n, V]."""
        teacher_logits = None if self.teacher is None else self.teacher.head(self.teacher.states[self.rows])
        weights = None if self.weights is None else self.weights[self.rows]
        compared = (student_logits, teacher_logits, self.labels[self.rows], self.objective, weights)
        return fused_objective(*compared) if fused and learns else _in_blocks(*compared, learns=learns)


def _values_alone(student: HiddenStates, chunks: Sequence[_Chunk]) -> LossValues:
    head = aligned(student.head)
    values = [chunk.values(head(student.states[chunk.rows]), learns=False) for chunk in chunks]
    losses, cross_entropies, divergences = _joined(values)
    return LossValues(losses.sum(), cross_entropies, divergences)


def _with_gradient(student: HiddenStates, chunks: Sequence[_Chunk], *, fused: bool) -> LossValues:
    of_head = _HeadGradient(student, summed=len(chunks) > 1)
    found = [_chunk_gradient(student.states, chunk, of_head, fused=fused) for chunk in chunks]
    losses, cross_entropies, divergences = _joined([values for values, _ in found])
    gradients = [torch.cat([by_states for _, by_states in found]), *of_head.by_parameter()]
    loss = _with_known_gradient(losses.sum(), gradients, student.states, *of_head.parameters)
    return LossValues(loss, cross_entropies, divergences)


def _joined(parts: Sequence[Values]) -> Values:
    losses, cross_entropies, divergences = (torch.cat(column) for column in zip(*parts, strict=True))
    return losses, cross_entropies, divergences


def _chunk_gradient(states: Tensor, chunk: _Chunk, of_head: "_HeadGradient", *, fused: bool) -> tuple[Values, Tensor]:
    """A chunk's values, and the gradient of its loss w.r.t. its states [n, H]; the head's is added to ``of_head``."""
    head, rows = of_head.head, states[chunk.rows].detach().requires_grad_()
    with _frozen(of_head.parameters):  # their gradients are summed in ``of_head``, without another tensor of that size
        product = head.module(rows)
    logits = head.logits(product)
    values = chunk.values(logits.detach(), learns=True, fused=fused)
    by_rows, by_product = _back_to_rows(head, rows, product, logits)
    of_head.add(rows.detach(), by_product)
    return values, by_rows


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


class _HeadGradient:
    """The gradient w.r.t. a head's trainable parameters, added up chunk by chunk.

    Allocated before any logits, whose memory the next chunk's can then reuse. If chunks are summed, in float32 at
    least, since bfloat16 would lose small addends.
    """

    def __init__(self, student: HiddenStates, *, summed: bool) -> None:
        given, states = student.head.module, student.states
        self.parameters = student.head.trained_parameters()
        self.head = aligned(student.head)
        self._num_rows = student.head.shape[0]
        num_rows, width = self.head.shape
        dtype = torch.promote_types(states.dtype, torch.float32) if summed else states.dtype
        shapes = {id(given.weight): (num_rows, width), id(given.bias): (num_rows,)}
        self._totals = [states.new_empty(shapes[id(parameter)], dtype=dtype) for parameter in self.parameters]
        self._filled = False

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add a chunk's part, from the head's input [n, H] and the ``gradient`` w.r.t. its output [n, V]."""
        for total in self._totals:
            if total.dim() == 2 and total.dtype == gradient.dtype:
                total.addmm_(gradient.t(), rows, beta=int(self._filled))
                continue
            part = gradient.t() @ rows if total.dim() == 2 else gradient.sum(0, dtype=total.dtype)
            total.add_(part) if self._filled else total.copy_(part)
        self._filled = True

    def by_parameter(self) -> list[Tensor]:
        """The gradient w.r.t. each of ``parameters``, without the rows that ``aligned`` added."""
        return [total[: self._num_rows] for total in self._totals]


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


_with_known_gradient: Callable[..., Tensor] = _WithGradient.apply


def _in_blocks(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    objective: StageObjective,
    weights: Weights | None,
    *,
    learns: bool,
) -> Values:
    """``token_objective``, some rows at a time; if it ``learns``, its gradient overwrites the student's logits.

    [N, V], [N, V], [N], [N] -> 3 x [N].
    """
    num_rows = max(1, BLOCK_NUMBERS[student_logits.device.type] // student_logits.shape[1])
    blocks = []
    for start in range(0, max(1, len(labels)), num_rows):
        block = slice(start, start + num_rows)
        loss, cross_entropy, divergence, gradient = token_objective(
            student_logits[block],
            None if teacher_logits is None else teacher_logits[block],
            labels[block],
            objective,
            None if weights is None else weights[block],
            learns=learns,
        )
        if gradient is not None:
            student_logits[block] = gradient
        blocks.append((loss, cross_entropy, divergence))
    return _joined(blocks)


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
