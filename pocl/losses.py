"""The divergences between teacher and student with their gradients, a few lines each, and their registry.

Every function takes log-probabilities ``[N, V]`` of N response tokens over V vocabulary entries and returns one value
per token ``[N]`` in nats, and beside it the slope ``[N, V]``: the derivative of the value by each log-probability of
the student. Through a softmax a multiple of q in the slope counts for nothing, so slopes leave such terms out. Below,
q is the student's distribution, p the teacher's, m a mixture of both. The caller weighs and normalises.

To add a divergence, write it here and give it a line in ``_FAMILIES``: ``--type NAME`` and ``--type tNAME`` then
exist. One whose slope is not known returns its value alone under ``@slope_by_autograd``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from pocl.errors import UserError, closest

ValueAndSlope = tuple[Tensor, Tensor]  # [N], [N, V]
Divergence = Callable[[Tensor, Tensor], ValueAndSlope]

# exp(-1e4) is exactly 0 in float64. Without the bound a vocabulary entry that both models mask gives 0 * (inf - inf).
MIN_LOG_PROB = -1e4


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax of ``logits / temperature``, in float32 at least, bounded below.  [N, V] -> [N, V], nats."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if temperature == 1.0 else logits / temperature
    # Not torch.log_softmax: on the CPU its float32 sum over 50,000 entries is off by 1e-5, this one by 1e-6.
    return (logits - logits.logsumexp(-1, keepdim=True)).clamp_(min=MIN_LOG_PROB)


def through_softmax(slope: Tensor, logp: Tensor) -> Tensor:
    """From the derivative by log-probabilities to the derivative by logits (at T = 1).  [N, V], [N, V] -> [N, V]."""
    q = logp.exp()
    # Rounding leaves the sum of q at 1 ± 1e-6; unless divided by, that is large beside a slope that is nearly c q.
    return torch.addcmul(slope, q, slope.sum(-1, keepdim=True) / q.sum(-1, keepdim=True), value=-1.0)


def slope_by_autograd(value: Callable[..., Tensor]) -> Callable[..., ValueAndSlope]:
    """A divergence of which only the value is written down; autograd finds the slope."""

    @wraps(value)
    def divergence(student_logp: Tensor, teacher_logp: Tensor, **own: Any) -> ValueAndSlope:
        with torch.enable_grad():
            leaf = student_logp.detach().requires_grad_()
            values = value(leaf, teacher_logp, **own)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), slope

    return divergence


def forward_kl(student_logp: Tensor, teacher_logp: Tensor) -> ValueAndSlope:
    """KL(p || q).  [N, V], [N, V] -> [N] in nats, slope [N, V].  Source: Hinton et al., arXiv 1503.02531."""
    p = teacher_logp.exp()
    return (p * (teacher_logp - student_logp)).sum(-1), -p


def reverse_kl(student_logp: Tensor, teacher_logp: Tensor) -> ValueAndSlope:
    """KL(q || p).  [N, V], [N, V] -> [N] in nats, slope [N, V].  Source: MiniLLM, arXiv 2306.08543.

    By q the derivative is log(q / p) + 1; by log q it is q times that.
    """
    slope = student_logp.exp() * (student_logp - teacher_logp)
    return slope.sum(-1), slope


def jensen_shannon(student_logp: Tensor, teacher_logp: Tensor, *, teacher_weight: float = 0.1) -> ValueAndSlope:
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q.  [N, V], [N, V] -> [N] in nats, slope [N, V].

    ``teacher_weight`` is w; 0.1 is the paper's 0.9 for the student, and TRL's ``beta=0.1``. By q the derivative is
    (1 - w) log(q / m): what comes through m is the constant w - 1.  Source: GKD, arXiv 2306.13649.
    """
    w = teacher_weight
    slope = (1.0 - w) * student_logp.exp() * _log_to_mixture(student_logp, teacher_logp, 1.0 - w)
    teacher_part = (teacher_logp.exp() * _log_to_mixture(teacher_logp, student_logp, w)).sum(-1)
    return w * teacher_part + slope.sum(-1), slope


def total_variation(student_logp: Tensor, teacher_logp: Tensor) -> ValueAndSlope:
    """Half the L1 distance of the distributions.  [N, V], [N, V] -> [N] in [0, 1], slope [N, V].

    Source: arXiv 2307.15190.
    """
    q = student_logp.exp()
    difference = q - teacher_logp.exp()
    return 0.5 * difference.abs().sum(-1), 0.5 * q * difference.sign()


def skew_forward_kl(student_logp: Tensor, teacher_logp: Tensor, *, skew: float = 0.1) -> ValueAndSlope:
    """KL(p || m), m = a p + (1 - a) q, a = ``skew``.  [N, V], [N, V] -> [N] in nats, slope [N, V].

    By q the derivative is -(1 - a) p / m.  Source: DistiLLM, arXiv 2402.03898.
    """
    log_ratio = _log_to_mixture(teacher_logp, student_logp, skew)  # log(p / m)
    return (teacher_logp.exp() * log_ratio).sum(-1), (skew - 1.0) * (student_logp + log_ratio).exp()


def skew_reverse_kl(student_logp: Tensor, teacher_logp: Tensor, *, skew: float = 0.1) -> ValueAndSlope:
    """KL(q || m), m = a q + (1 - a) p, a = ``skew``.  [N, V], [N, V] -> [N] in nats, slope [N, V].

    By q the derivative is log(q / m) + 1 - a q / m.  Source: DistiLLM, arXiv 2402.03898.
    """
    q, log_ratio = student_logp.exp(), _log_to_mixture(student_logp, teacher_logp, skew)  # log(q / m)
    return (q * log_ratio).sum(-1), q * (log_ratio - skew * log_ratio.exp())


def _log_to_mixture(first_logp: Tensor, second_logp: Tensor, weight: float) -> Tensor:
    """log(first / m), m = weight * first + (1 - weight) * second, in log space: probabilities would underflow.

    It goes through log(second / first): log first - log m would be two large numbers and mostly their rounding.
    """
    log_weight = first_logp.new_full((), math.log(weight))
    return torch.logaddexp(second_logp - first_logp + math.log1p(-weight), log_weight).neg_()


@dataclass(frozen=True)
class LossType:
    """What ``--type`` names: a divergence, whether a temperature belongs to it, and the power of T that scales it."""

    name: str
    divergence: Callable[..., ValueAndSlope]
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
_FAMILIES: dict[str, tuple[Callable[..., ValueAndSlope], str | None, int, int]] = {
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
