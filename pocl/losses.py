"""The divergences between teacher and student, one or two lines each, and their registry.

Every function takes log-probabilities ``[N, V]`` of N response tokens over V vocabulary entries and returns one
value per token ``[N]`` in nats; the caller weighs and normalises. To add one, write it here and give it a line in
``_FAMILIES``: ``--type NAME`` and ``--type tNAME`` then exist.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pocl.errors import UserError, closest

Divergence = Callable[[Tensor, Tensor], Tensor]

# exp(-1e4) is exactly 0 in float64. Without the bound a vocabulary entry that both models mask gives 0 * (inf - inf).
MIN_LOG_PROB = -1e4


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax of ``logits / temperature``, in float32 at least, bounded below.  [N, V] -> [N, V], nats."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits / temperature, dim=-1).clamp(min=MIN_LOG_PROB)


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(teacher || student).  [N, V], [N, V] -> [N], nats.  Source: Hinton et al., arXiv 1503.02531."""
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """KL(student || teacher).  [N, V], [N, V] -> [N], nats.  Source: MiniLLM, arXiv 2306.08543."""
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, *, teacher_weight: float = 0.1) -> Tensor:
    """w KL(teacher || m) + (1 - w) KL(student || m), m = w teacher + (1 - w) student.  [N, V], [N, V] -> [N], nats.

    ``teacher_weight`` is w; 0.1 is the paper's 0.9 for the student, and TRL's ``beta=0.1``.
    Source: GKD, arXiv 2306.13649.
    """
    mixture_logp = _mix(teacher_logp, student_logp, teacher_weight)
    teacher_part = (teacher_logp.exp() * (teacher_logp - mixture_logp)).sum(-1)
    student_part = (student_logp.exp() * (student_logp - mixture_logp)).sum(-1)
    return teacher_weight * teacher_part + (1.0 - teacher_weight) * student_part


def total_variation(student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
    """Half the L1 distance of the distributions.  [N, V], [N, V] -> [N], in [0, 1].  Source: arXiv 2307.15190."""
    return 0.5 * (student_logp.exp() - teacher_logp.exp()).abs().sum(-1)


def skew_forward_kl(student_logp: Tensor, teacher_logp: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL from the teacher to a mixture that holds ``skew`` of the teacher.  [N, V], [N, V] -> [N], nats.

    Source: DistiLLM, arXiv 2402.03898.
    """
    return (teacher_logp.exp() * (teacher_logp - _mix(teacher_logp, student_logp, skew))).sum(-1)


def skew_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, skew: float = 0.1) -> Tensor:
    """KL from the student to a mixture that holds ``skew`` of the student.  [N, V], [N, V] -> [N], nats.

    Source: DistiLLM, arXiv 2402.03898.
    """
    return (student_logp.exp() * (student_logp - _mix(student_logp, teacher_logp, skew))).sum(-1)


def _mix(first_logp: Tensor, second_logp: Tensor, weight: float) -> Tensor:
    """log(weight * first + (1 - weight) * second), in log space: the sum of probabilities would underflow."""
    return torch.logaddexp(first_logp + math.log(weight), second_logp + math.log1p(-weight))


@dataclass(frozen=True)
class LossType:
    """What ``--type`` names: a divergence, whether a temperature belongs to it, and the power of T that scales it."""

    name: str
    divergence: Callable[..., Tensor]
    tempered: bool
    uniform_power: int
    published_power: int
    parameter: str | None = None  # the one option that the divergence takes: "skew" or "teacher_weight"

    def power(self, scaling: str) -> int:
        """k of T^k: ``uniform`` keeps the gradient's size steady as T rises, ``published`` is the paper's code."""
        return {"uniform": self.uniform_power, "published": self.published_power}[scaling]

    def bind(self, *, skew: float = 0.1, teacher_weight: float = 0.1) -> Divergence:
        """The divergence as a function of (student_logp, teacher_logp), its own parameter filled in.

        Raises UserError where that parameter is not strictly between 0 and 1.
        """
        if self.parameter is None:
            return self.divergence
        value = {"skew": skew, "teacher_weight": teacher_weight}[self.parameter]
        if not 0.0 < value < 1.0:
            flag = self.parameter.replace("_", "-")
            raise UserError(f"--{flag} is {value}; {self.name} wants a value strictly between 0 and 1, such as 0.1")
        return partial(self.divergence, **{self.parameter: value})


# name -> (divergence, its parameter, uniform power of T, published power of T)
_FAMILIES: dict[str, tuple[Callable[..., Tensor], str | None, int, int]] = {
    "fkl": (forward_kl, None, 2, 2),
    "rkl": (reverse_kl, None, 2, 0),
    "jsd": (jensen_shannon, "teacher_weight", 2, 2),
    "tvd": (total_variation, None, 1, 0),
    "sfkl": (skew_forward_kl, "skew", 2, 0),
    "srkl": (skew_reverse_kl, "skew", 2, 2),
}

LOSSES: dict[str, LossType] = {
    prefix + name: LossType(prefix + name, divergence, bool(prefix), uniform, published, parameter)
    for prefix in ("", "t")
    for name, (divergence, parameter, uniform, published) in _FAMILIES.items()
}

ALIASES: dict[str, str] = {"kd": "fkl", "ttvdf": "ttvd"}

SFT = "sft"  # cross-entropy alone: no teacher, no divergence


def loss_type(name: str) -> LossType | None:
    """The loss that ``--type name`` means, or None for ``sft``.

    Raises UserError for an unknown name, with the closest one and all of them.
    """
    name = ALIASES.get(name, name)
    if name == SFT:
        return None
    if name not in LOSSES:
        known = [SFT, *LOSSES, *ALIASES]
        raise UserError(f"unknown --type {name!r}{closest(name, known)} (known: {', '.join(known)})")
    return LOSSES[name]
