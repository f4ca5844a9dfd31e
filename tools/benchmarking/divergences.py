"""What tools/benchmark.py compares beside the steps: one divergence on the same tensors, here and in other libraries.

The generalised Jensen-Shannon divergence between two heads' distributions, from hidden states to the gradients of the
student's states and head. TRL and Liger are compared with where they are installed.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.losses import DistillationLoss, HiddenStates
from pocl.losses.fused import never_fused
from pocl.losses.head import aligned
from pocl.models.states import make_head
from tools.benchmarking.meters import Stopwatch
from tools.benchmarking.pairs import PAIRS, build_model
from tools.benchmarking.stepping import TEMPERATURE

TEACHER_WEIGHT = 0.1
_ROWS_IN_FLOAT64 = 64  # at a time


@dataclass(frozen=True)
class Rows:
    """N response tokens: what two models make of them, labels."""

    student: HiddenStates  # wants gradients
    teacher: HiddenStates  # its head is aligned, as train.py has it
    labels: Tensor  # [N]
    chunk_tokens: int
    compiled: bool = True  # False: without the compiler, whose own memory would be measured as well

    @property
    def weight(self) -> Tensor:
        """The student's head.  [V, H_s]."""
        return self.student.head.module.weight

    @property
    def teacher_weight(self) -> Tensor:
        """The teacher's head.  [V, H_t]."""
        return self.teacher.head.module.weight[: self.teacher.head.num_logits].detach()


Loss = Callable[[Rows], Tensor]  # -> [], the divergence per token


def make_rows(
    pair: str, num_tokens: int, *, dtype: str, device: torch.device, chunk_tokens: int, compiled: bool
) -> Rows:
    """The heads of a pair, and random states of the size that a last norm leaves."""
    student, teacher = (build_model(shape, dtype=dtype, device=device, head_only=True) for shape in PAIRS[pair]())
    generator = torch.Generator(device).manual_seed(0)

    def states(model: PreTrainedModel) -> Tensor:
        width = model.get_output_embeddings().in_features
        return torch.randn(num_tokens, width, dtype=model.dtype, device=device, generator=generator)

    of_student = HiddenStates(states(student).requires_grad_(), make_head(student))
    of_teacher = HiddenStates(states(teacher), aligned(make_head(teacher.requires_grad_(False))))
    labels = torch.randint(of_student.head.num_logits, (num_tokens,), device=device, generator=generator)
    return Rows(of_student, of_teacher, labels, chunk_tokens, compiled)


def ours(rows: Rows) -> Tensor:
    """The project's objective, at r = 1, without its T^k."""
    loss = DistillationLoss("tjsd", teacher_weight=TEACHER_WEIGHT, chunk_tokens=rows.chunk_tokens)
    if never_fused(loss.divergence, rows.labels.device, rows.teacher.states.dtype) is None:
        loss = replace(loss, fused=True)
    values = loss(rows.student, rows.teacher, rows.labels, temperature=TEMPERATURE)
    return values.loss / (TEMPERATURE**loss.power * len(rows.labels))


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
    teacher_logits = (rows.teacher.states @ rows.teacher_weight.T).float()
    return plain((rows.student.states @ rows.weight.T).float(), teacher_logits) / len(rows.labels)


def trl(rows: Rows) -> Tensor:
    """TRL's GKD loss, on logits."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher_logits = rows.teacher.states @ rows.teacher_weight.T
    return GKDTrainer.generalized_jsd_loss(
        (rows.student.states @ rows.weight.T)[None],
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
    return loss(rows.student.states, rows.weight, rows.teacher.states, rows.teacher_weight, rows.labels)


def contenders() -> dict[str, Loss]:
    """Every implementation that can run here."""
    others = {"TRL, GKD": ("trl", trl), "Liger, chunked JSD": ("liger_kernel", liger)}
    installed = {name: loss for name, (package, loss) in others.items() if importlib.util.find_spec(package)}
    return {"plain autograd": naive, "this project": ours, **installed}


def gradients(rows: Rows, loss: Loss) -> tuple[float, list[Tensor]]:
    """(the loss, its gradients by the student's states and head)."""
    rows.student.states.grad = rows.weight.grad = None
    value = loss(rows)
    value.backward()
    return float(value.detach()), [rows.student.states.grad, rows.weight.grad]


def true_gradients(rows: Rows) -> list[Tensor]:
    """The same gradients in float64, some rows at a time."""
    weight = rows.weight.detach().double().requires_grad_()
    parts = []
    for start in range(0, len(rows.labels), _ROWS_IN_FLOAT64):
        piece = slice(start, start + _ROWS_IN_FLOAT64)
        states = rows.student.states[piece].detach().double().requires_grad_()
        with torch.no_grad():
            teacher_logits = rows.teacher.states[piece].double() @ rows.teacher_weight.double().T
        (plain(states @ weight.T, teacher_logits) / len(rows.labels)).backward()
        parts.append(states.grad)
    return [torch.cat(parts), weight.grad]


def largest_error(found: list[Tensor], true: list[Tensor]) -> float:
    """The largest difference in a gradient, as a share of that gradient's largest entry."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, true, strict=True))


def compare(rows: Rows, rounds: int) -> list[dict[str, Any]]:
    """One record an implementation: its value, the error of its gradients against float64, seconds by round."""
    losses, true, records = contenders(), true_gradients(rows), []
    for name, loss in losses.items():
        value, found = gradients(rows, loss)
        records.append({"name": name, "loss": value, "gradient_error": largest_error(found, true), "seconds": []})
    for _ in range(rounds):
        for loss, record in zip(losses.values(), records, strict=True):
            with Stopwatch(rows.labels.device) as taken:
                gradients(rows, loss)
            record["seconds"].append(taken.seconds)
    return records
