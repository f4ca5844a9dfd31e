"""What tools/benchmark.py compares beside the steps: one divergence on the same tensors, here and in other libraries.

The generalised Jensen-Shannon divergence between two heads' distributions, from hidden states to the gradients of the
student's states and head. TRL and Liger are compared with where they are installed.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.losses.chunked import chunks_needed, distillation_objective
from pocl.losses.divergences import LOSSES
from pocl.losses.fused import never_fused
from pocl.losses.head import Head, aligned
from pocl.losses.token import StageObjective
from pocl.models.states import make_head
from tools.benchmarking.stepping import TEMPERATURE

TEACHER_WEIGHT = 0.1
_ROWS_IN_FLOAT64 = 64  # at a time


@dataclass(frozen=True)
class Rows:
    """N response tokens: hidden states, the models whose heads turn them into logits, labels."""

    student_states: Tensor  # [N, H_s], wants a gradient
    teacher_states: Tensor  # [N, H_t]
    labels: Tensor  # [N]
    student: PreTrainedModel
    teacher: PreTrainedModel
    teacher_head: Head  # as train.py has it
    chunk_tokens: int
    compiled: bool = True  # False: without the compiler, whose own memory would be measured as well

    @property
    def weight(self) -> Tensor:
        """The student's head.  [V, H_s]."""
        return self.student.get_output_embeddings().weight

    @property
    def teacher_weight(self) -> Tensor:
        """The teacher's head.  [V, H_t]."""
        return self.teacher.get_output_embeddings().weight


Loss = Callable[[Rows], Tensor]  # -> [], the divergence per token


def make_rows(
    student: PreTrainedModel, teacher: PreTrainedModel, num_tokens: int, *, chunk_tokens: int, compiled: bool = True
) -> Rows:
    """Random states of the size that a last norm leaves."""
    head = student.get_output_embeddings().weight
    generator = torch.Generator(head.device).manual_seed(0)
    (vocab_size, width), teacher_width = head.shape, teacher.get_output_embeddings().weight.shape[1]

    def states(width: int) -> Tensor:
        return torch.randn(num_tokens, width, dtype=head.dtype, device=head.device, generator=generator)

    labels = torch.randint(vocab_size, (num_tokens,), device=head.device, generator=generator)
    both = states(width).requires_grad_(), states(teacher_width)
    limits = {"chunk_tokens": chunk_tokens, "compiled": compiled}
    return Rows(*both, labels, student, teacher, aligned(make_head(teacher)), **limits)


def ours(rows: Rows) -> Tensor:
    """The project's objective, at r = 1."""
    term = StageObjective(LOSSES["tjsd"].bind(teacher_weight=TEACHER_WEIGHT), TEMPERATURE, 1.0, 1.0)
    result = distillation_objective(
        rows.student_states,
        make_head(rows.student),
        rows.teacher_states,
        rows.teacher_head,
        rows.labels,
        term=term,
        num_chunks=chunks_needed(len(rows.labels), rows.chunk_tokens),
        fused=never_fused(term.divergence, rows.labels.device, rows.teacher_states.dtype) is None,
    )
    return result.loss / len(rows.labels)


def plain(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The definition, summed over tokens, by plain autograd.  [N, V], [N, V] -> []."""
    student_logp = torch.log_softmax(student_logits / TEMPERATURE, dim=-1)
    teacher_logp = torch.log_softmax(teacher_logits / TEMPERATURE, dim=-1)
    student_probs, teacher_probs = student_logp.exp(), teacher_logp.exp()
    mixture_logp = (TEACHER_WEIGHT * teacher_probs + (1 - TEACHER_WEIGHT) * student_probs).log()
    of_teacher = (teacher_probs * (teacher_logp - mixture_logp)).sum()
    of_student = (student_probs * (student_logp - mixture_logp)).sum()
    return TEACHER_WEIGHT * of_teacher + (1 - TEACHER_WEIGHT) * of_student


def naive(rows: Rows) -> Tensor:
    """``plain`` on all rows at once."""
    teacher_logits = (rows.teacher_states @ rows.teacher_weight.T).float()
    return plain((rows.student_states @ rows.weight.T).float(), teacher_logits) / len(rows.labels)


def trl(rows: Rows) -> Tensor:
    """TRL's GKD loss, on logits."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = rows.teacher_states @ rows.teacher_weight.T
    return GKDTrainer.generalized_jsd_loss(
        (rows.student_states @ rows.weight.T)[None],
        teacher_logits[None],
        labels=rows.labels[None],
        beta=TEACHER_WEIGHT,
        temperature=TEMPERATURE,
    )


def liger(rows: Rows) -> Tensor:
    """Liger's chunked JSD, on states and heads; compiled, as it comes, where there is a compiler."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"beta": TEACHER_WEIGHT, "temperature": TEMPERATURE, "chunk_size": rows.chunk_tokens}
    compiled = rows.compiled and (rows.labels.is_cuda or shutil.which("g++") is not None)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled, **settings)
    return loss(rows.student_states, rows.weight, rows.teacher_states, rows.teacher_weight.detach(), rows.labels)


def contenders() -> dict[str, Loss]:
    """Every implementation that can run here."""
    others = {"TRL, GKD": ("trl", trl), "Liger, chunked JSD": ("liger_kernel", liger)}
    installed = {name: loss for name, (package, loss) in others.items() if importlib.util.find_spec(package)}
    return {"plain autograd": naive, "this project": ours, **installed}


def gradients(rows: Rows, loss: Loss) -> tuple[float, list[Tensor]]:
    """(the loss, its gradients by the student's states and head)."""
    rows.student_states.grad = rows.weight.grad = None
    value = loss(rows)
    value.backward()
    return float(value.detach()), [rows.student_states.grad, rows.weight.grad]


def true_gradients(rows: Rows) -> list[Tensor]:
    """The same gradients in float64, some rows at a time."""
    weight = rows.weight.detach().double().requires_grad_()
    parts = []
    for start in range(0, len(rows.labels), _ROWS_IN_FLOAT64):
        piece = slice(start, start + _ROWS_IN_FLOAT64)
        states = rows.student_states[piece].detach().double().requires_grad_()
        with torch.no_grad():
            teacher_logits = rows.teacher_states[piece].double() @ rows.teacher_weight.double().T
        (plain(states @ weight.T, teacher_logits) / len(rows.labels)).backward()
        parts.append(states.grad)
    return [torch.cat(parts), weight.grad]


def largest_error(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest difference in a gradient, as a share of that gradient's largest entry."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, true, strict=True))
