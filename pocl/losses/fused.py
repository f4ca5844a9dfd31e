"""The token objective as one GPU kernel (pocl/losses/kernel.py): when it can be used, a trial beforehand, its call.

Counted for the paper's step of 64 examples and a vocabulary of 50,257: torch's operations make some thirty passes over
float32 logits; the kernel makes three over both models' logits in their own dtype, and writes once.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pocl.common.errors import first_line
from pocl.losses import divergences as losses
from pocl.losses.token import StageObjective, Weights, token_objective

# In the order of the kernel's KIND, from 1; 0 is cross-entropy alone.
_KINDS: tuple[Callable[..., Any], ...] = (
    losses.forward_kl,
    losses.reverse_kl,
    losses.jensen_shannon,
    losses.total_variation,
    losses.skew_forward_kl,
    losses.skew_reverse_kl,
)
# Eight entries per thread, which fit 64 registers without spilling (compiled for an A800 and an H200).
_BLOCK, _WARPS = 4096, 16
_LOAD = 16  # entries: rows are padded to a multiple of this if there is room, so that whole words can be read

_ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative to the gradient's norm
_ALLOWED_VALUES = 1e-4


def never_fused(divergence: losses.Divergence | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no kernel for this, as far as can be told beforehand; None if there is one."""
    if device.type != "cuda":
        return "it needs a GPU"
    if dtype not in _ALLOWED:
        return f"the kernel does not support {dtype}"
    if divergence is not None and _function(divergence) not in _KINDS:
        return (
            f"pocl/losses/kernel.py has no {getattr(_function(divergence), '__name__', 'kernel of this divergence')}"
        )
    if find_spec("triton") is None:
        return "Triton is not installed"
    return None


def why_not_fused(
    divergence: losses.Divergence | None, device: torch.device, dtype: torch.dtype, *, vocab_size: int
) -> str | None:
    """Why the kernel is not used: see ``never_fused``, or it fails, or its results differ from torch's operations.

    None if it can be used. It is tried on a few random tokens, at T = 1 and at another T.
    """
    never = never_fused(divergence, device, dtype)
    if never is not None:
        return never
    generator = torch.Generator().manual_seed(0)
    student, teacher = ((3.0 * torch.randn(4, vocab_size, generator=generator)).to(device, dtype) for _ in range(2))
    labels = torch.arange(4, device=device) % vocab_size
    for temperature in (1.0, 1.5):
        objective = StageObjective(divergence, temperature, temperature**2, 0.6)
        try:
            found = student.clone()
            values = fused_objective(found, teacher, labels, objective)
        except Exception as error:  # whatever a third-party compiler may raise
            return f"the kernel fails: {first_line(error)}"
        wanted = token_objective(student, teacher, labels, objective)
        allowed = (*[_ALLOWED_VALUES] * len(values), _ALLOWED[dtype])
        if not all(map(_close, (*values, found.float()), wanted, allowed)):
            return "the kernel's results differ from torch's operations"
    return None


def _close(found: Tensor, wanted: Tensor | None, allowed: float) -> bool:
    return wanted is not None and bool(torch.norm(found - wanted) <= allowed * torch.norm(wanted))


def _function(divergence: losses.Divergence) -> Callable[..., Any]:
    return getattr(divergence, "func", divergence)  # a divergence with a parameter is a partial


def fused_objective(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    objective: StageObjective,
    weights: Weights | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``token_objective`` by one kernel: (loss, cross-entropy, divergence) of each token, float32.

    [N, V], [N, V], [N] -> 3 x [N]. The gradient w.r.t. the student's logits overwrites them. Both logits may be the
    first V entries of wider rows; up to 15 of the student's entries after them are set to 0.  Raises what Triton
    raises if it cannot compile.
    """
    from pocl.losses import kernel

    num_tokens, num_entries = student_logits.shape
    loss, cross_entropy, divergence = (
        torch.empty(num_tokens, dtype=torch.float32, device=labels.device) for _ in range(3)
    )
    if num_tokens == 0:
        return loss, cross_entropy, divergence
    kind, parameter, temperature, teacher = 0, 0.0, 1.0, student_logits
    if objective.divergence is not None and teacher_logits is not None:
        kind = 1 + _KINDS.index(_function(objective.divergence))
        temperature, teacher = objective.temperature, teacher_logits
        parameter = next(iter(getattr(objective.divergence, "keywords", {}).values()), 0.0)
    if student_logits.stride(1) != 1 or teacher.stride(1) != 1 or teacher.shape != student_logits.shape:
        raise ValueError(
            f"logits of shape {tuple(student_logits.shape)} and {tuple(teacher.shape)}; "
            f"expected equal shapes and contiguous rows"
        )
    weight, weight_of_labels = objective.weights(weights, loss)
    wider = num_entries + -num_entries % _LOAD
    kernel.token_objective[(num_tokens,)](
        student_logits,
        teacher,
        labels,
        weight,
        weight if weight_of_labels is None else weight_of_labels,
        loss,
        cross_entropy,
        divergence,
        student_logits.stride(0),
        teacher.stride(0),
        num_entries,
        wider if _has_room(student_logits, wider) and _has_room(teacher, wider) else num_entries,
        1.0 / temperature,
        parameter,
        KIND=kind,
        TEMPERED=temperature != 1.0,
        CROSS_ENTROPY=kind == 0 or weight_of_labels is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return loss, cross_entropy, divergence


def _has_room(logits: Tensor, width: int) -> bool:
    """Whether every row has ``width`` entries, those past V included, that belong to no other row."""
    stored = logits.untyped_storage().nbytes() // logits.element_size() - logits.storage_offset()
    return logits.stride(0) >= width and (len(logits) - 1) * logits.stride(0) + width <= stored
