"""Cross-entropy and divergence over response tokens, from hidden states and heads, in chunks.

The logits of one chunk of tokens exist at a time, forward and backward: each chunk is recomputed in the backward pass,
so peak memory does not grow with tokens times vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pocl import distributed
from pocl.data import IGNORE, Batch
from pocl.losses import Divergence, log_probs
from pocl.models import Head, make_head, response_labels, response_states


@dataclass(frozen=True)
class Objective:
    """What one micro-batch contributes: a sum to differentiate, and one value per response token to report."""

    loss: Tensor  # [], the sum over tokens of (1 - r) CE + r T^k D
    cross_entropy: Tensor  # [N], nats, at T = 1, detached
    divergence: Tensor  # [N], nats, at T, before T^k, detached; zeros without a teacher


@dataclass(frozen=True)
class Term:
    """The divergence of a stage: the function, its temperature T, the factor T^k, and the KD ratio r."""

    divergence: Divergence | None = None  # None: cross-entropy alone
    temperature: float = 1.0
    scale: float = 1.0
    kd_ratio: float = 0.0  # where each token has its own ratio, this is only its upper bound
    cross_entropy: bool = True  # False: the objective is the divergence's part alone, as on the student's own text


def distillation_objective(
    student_states: Tensor,
    student_head: Head,
    teacher_states: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor,
    *,
    term: Term,
    kd_ratio: Tensor | None = None,
    num_chunks: int = 1,
) -> Objective:
    """The objective of N response tokens, summed.  [N, H_s], [N, H_t], [N] -> Objective.

    ``kd_ratio`` [N] gives each token a ratio of its own in place of the term's.

    The tokens are cut into ``num_chunks`` equal parts whose logits exist one after the other.
    The caller divides ``loss`` once by the number of response tokens in the whole optimiser step.
    Source: POCL, arXiv 2506.05695, section 3.  Raises ValueError where the numbers of rows differ.
    """
    num_tokens = labels.shape[0]
    if student_states.shape[0] != num_tokens or (teacher_states is not None and teacher_states.shape[0] != num_tokens):
        teacher_tokens = num_tokens if teacher_states is None else teacher_states.shape[0]
        raise ValueError(
            f"{student_states.shape[0]} student states, {teacher_tokens} teacher states and {num_tokens} labels; "
            f"one of each per response token was wanted"
        )

    def chunk(
        student_rows: Tensor, teacher_rows: Tensor | None, row_labels: Tensor, row_ratio: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            teacher_logits = None if teacher_rows is None or teacher_head is None else teacher_head(teacher_rows)
        return token_objective(student_head(student_rows), teacher_logits, row_labels, term, row_ratio)

    parts = []
    for i in range(num_chunks):
        piece = slice(num_tokens * i // num_chunks, num_tokens * (i + 1) // num_chunks)
        columns = (student_states, teacher_states, labels, kd_ratio)
        arguments = tuple(None if column is None else column[piece] for column in columns)
        if num_chunks > 1 and torch.is_grad_enabled():
            parts.append(checkpoint(chunk, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(chunk(*arguments))
    losses, cross_entropies, divergences = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return Objective(losses.sum(), cross_entropies.detach(), divergences.detach())


def token_objective(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, term: Term, kd_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(objective, cross-entropy, divergence) of each token.  [N, V], [N, V], [N] -> 3 x [N]."""
    plain_logp = log_probs(student_logits)
    cross_entropy = nll_loss(plain_logp, labels, reduction="none")
    if term.divergence is None or teacher_logits is None:
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
    tempered_logp = plain_logp if term.temperature == 1.0 else log_probs(student_logits, term.temperature)
    divergence = term.divergence(tempered_logp, log_probs(teacher_logits, term.temperature))
    ratio = term.kd_ratio if kd_ratio is None else kd_ratio
    objective = ratio * term.scale * divergence
    # At r = 1 cross-entropy is left out, so that an infinite one cannot turn 0 * inf into NaN.
    if term.cross_entropy and (kd_ratio is not None or term.kd_ratio < 1.0):
        objective = objective + (1.0 - ratio) * cross_entropy
    return objective, cross_entropy, divergence


def chunks_needed(num_tokens: int, chunk_tokens: int) -> int:
    """How many chunks of at most ``chunk_tokens`` tokens there are, at least one."""
    return max(1, -(-num_tokens // chunk_tokens))


class StudentObjective(nn.Module):
    """Student and objective as one module, so that one forward call of the training engine does both.

    ``sharded``, which the engine sets, says that the head's weight is gathered from all ranks whenever it is called
    (ZeRO-3): all ranks then agree on the number of chunks, since a call that one rank makes alone waits forever.
    """

    sharded = False

    def __init__(self, student: PreTrainedModel, *, chunk_tokens: int, vocab_size: int | None = None) -> None:
        super().__init__()
        self.student = student
        self.chunk_tokens = chunk_tokens
        self._head = make_head(student, vocab_size)

    def forward(
        self,
        batch: Batch,
        term: Term,
        teacher_states: Tensor | None = None,
        teacher_head: Head | None = None,
        kd_ratio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(summed loss [], cross-entropy [N], divergence [N]) of a micro-batch; see ``Objective``.

        ``kd_ratio`` [B] gives each example a ratio of its own.
        """
        labels = response_labels(batch)
        num_chunks = chunks_needed(len(labels), self.chunk_tokens)
        if self.sharded:
            num_chunks = distributed.max_over_ranks(num_chunks, labels.device)
        token_ratio = None if kd_ratio is None else kd_ratio.repeat_interleave((batch.labels != IGNORE).sum(-1))
        result = distillation_objective(
            response_states(self.student, batch),
            self._head,
            teacher_states,
            teacher_head,
            labels,
            term=term,
            kd_ratio=token_ratio,
            num_chunks=num_chunks,
        )
        return result.loss, result.cross_entropy, result.divergence


@torch.no_grad()
def example_cross_entropy(
    model: PreTrainedModel, batch: Batch, *, chunk_tokens: int, vocab_size: int | None = None
) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, response tokens) of each example of a batch."""
    head, labels = make_head(model, vocab_size), response_labels(batch)
    num_chunks = chunks_needed(len(labels), chunk_tokens)
    states = response_states(model, batch)
    result = distillation_objective(states, head, None, None, labels, term=Term(), num_chunks=num_chunks)
    counts = (batch.labels != IGNORE).sum(-1).tolist()
    return [(float(part.double().sum()), len(part)) for part in result.cross_entropy.split(counts)]
