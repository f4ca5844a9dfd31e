"""The divergences between teacher and student with their gradients, a few lines each, and their registry.

Every function takes two ``Softmax`` of N response tokens over V vocabulary entries, the student's q and the teacher's
p, and returns one value per token ``[N]`` in nats, with the slope ``[N, V]``: the derivative of the value w.r.t. the
student's log-probabilities. Adding c q to it does not change the derivative w.r.t. the logits, so such terms are left
out. m is a mixture of both. The caller weights and normalises.

To add a divergence, write it here and give it a line in ``_FAMILIES``: ``--type NAME`` and ``--type tNAME`` then
exist. One without a known slope returns its value alone, under ``@slope_by_autograd``.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor

from pocl.common.errors import UserError, closest

ValueAndSlope = tuple[Tensor, Tensor]  # [N], [N, V]

# A lower bound on logits minus their maximum. exp(-1e4) is exactly 0 in float64; without the bound a vocabulary entry
# that both models mask gives 0 * (inf - inf).
MIN_SHIFTED = -1e4
MAX_LOG_RATIO = 80.0  # exp(88) is the largest that float32 holds


@dataclass(frozen=True)
class Softmax:
    """The distribution over the vocabulary of each token, from one exponential of its logits."""

    shifted: Tensor  # [N, V], logits / T minus their maximum
    weights: Tensor  # [N, V], their exponentials
    total: Tensor  # [N, 1], the sum of these

    @cached_property
    def probs(self) -> Tensor:
        """[N, V]."""
        return self.weights / self.total

    @cached_property
    def logp(self) -> Tensor:
        """Log-probabilities.  [N, V], nats."""
        return self.shifted - self.total.log()

    def logp_of(self, labels: Tensor) -> Tensor:
        """The log-probability of one entry of each token.  [N] -> [N], nats."""
        return (self.shifted.gather(-1, labels[:, None]) - self.total.log()).squeeze(-1)

    def log_ratio(self, other: "Softmax") -> Tensor:
        """log(self / other), in one pass fewer than from both ``logp``.  [N, V], nats."""
        return (self.shifted - other.shifted).sub_(self.total.log() - other.total.log())

    def tempered(self, temperature: float) -> "Softmax":
        """The softmax of the same logits divided by ``temperature``."""
        return self if temperature == 1.0 else _from_shifted(self.shifted / temperature)


Divergence = Callable[[Softmax, Softmax], ValueAndSlope]


def softmax(logits: Tensor, temperature: float = 1.0) -> Softmax:
    """The softmax of ``logits / temperature``, in float32 at least.  [N, V].

    Not torch.softmax, whose float32 sum over 50,000 entries is off by 1e-5 on the CPU; this one's is off by 1e-6.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    if temperature != 1.0:
        shifted.div_(temperature)
    return _from_shifted(shifted.clamp_(min=MIN_SHIFTED))


def _from_shifted(shifted: Tensor) -> Softmax:
    weights = shifted.exp()
    return Softmax(shifted, weights, weights.sum(-1, keepdim=True))


def through_softmax(slope: Tensor, q: Softmax, weight: Tensor | float = 1.0) -> Tensor:
    """From the derivative w.r.t. log-probabilities to that w.r.t. logits (at T = 1), in place.  [N, V] -> [N, V].

    The result is multiplied by ``weight``, [N, 1] or a number.
    """
    share = slope.sum(-1, keepdim=True) / q.total
    return slope.mul_(weight).addcmul_(q.weights, share * weight, value=-1.0)


def slope_by_autograd(value: Callable[..., Tensor]) -> Callable[..., ValueAndSlope]:
    """A divergence given only by its value, in terms of ``logp`` and ``probs``; autograd finds the slope."""

    @wraps(value)
    def divergence(q: Softmax, p: Softmax, **own: Any) -> ValueAndSlope:
        with torch.enable_grad():
            leaf = q.logp.detach().requires_grad_()
            values = value(Softmax(leaf, leaf.exp(), torch.ones_like(leaf[:, :1])), p, **own)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), slope

    return divergence


def forward_kl(q: Softmax, p: Softmax) -> ValueAndSlope:
    """KL(p || q) -> [N] in nats, slope [N, V].  Source: Hinton et al., arXiv 1503.02531."""
    slope = p.weights / -p.total
    return p.log_ratio(q).mul_(slope).sum(-1).neg_(), slope


def reverse_kl(q: Softmax, p: Softmax) -> ValueAndSlope:
    """KL(q || p) -> [N] in nats, slope [N, V].  Source: MiniLLM, arXiv 2306.08543.

    W.r.t. q the derivative is log(q / p) + 1; w.r.t. log q it is q times that.
    """
    slope = q.probs * q.log_ratio(p)
    return slope.sum(-1), slope


def jensen_shannon(q: Softmax, p: Softmax, *, teacher_weight: float = 0.1) -> ValueAndSlope:
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q -> [N] in nats, slope [N, V].

    ``teacher_weight`` is w; 0.1 is the paper's 0.9 for the student, and TRL's ``beta=0.1``. W.r.t. q the derivative is
    (1 - w) log(q / m): the part through m is the constant w - 1.  Source: GKD, arXiv 2306.13649.
    """
    w = teacher_weight
    ratio = p.log_ratio(q)
    slope = (q.probs * _log_mixture_over(ratio, 1.0 - w)).mul_(w - 1.0)
    teacher_part = (p.probs * _log_mixture_over(-ratio, w)).sum(-1)
    return slope.sum(-1) - w * teacher_part, slope


def total_variation(q: Softmax, p: Softmax) -> ValueAndSlope:
    """Half the L1 distance between the distributions -> [N] in [0, 1], slope [N, V].  Source: arXiv 2307.15190."""
    difference = q.probs - p.probs
    return 0.5 * difference.abs().sum(-1), difference.sign().mul_(q.probs).mul_(0.5)


def skew_forward_kl(q: Softmax, p: Softmax, *, skew: float = 0.1) -> ValueAndSlope:
    """KL(p || m), m = a p + (1 - a) q, a = ``skew`` -> [N] in nats, slope [N, V].

    W.r.t. q the derivative is -(1 - a) p / m.  Source: DistiLLM, arXiv 2402.03898.
    """
    over_p = _log_mixture_over(q.log_ratio(p), skew)  # log(m / p)
    return -(p.probs * over_p).sum(-1), (q.logp - over_p).exp_().mul_(skew - 1.0)


def skew_reverse_kl(q: Softmax, p: Softmax, *, skew: float = 0.1) -> ValueAndSlope:
    """KL(q || m), m = a q + (1 - a) p, a = ``skew`` -> [N] in nats, slope [N, V].

    W.r.t. q the derivative is log(q / m) + 1 - a q / m.  Source: DistiLLM, arXiv 2402.03898.
    """
    over_q = _log_mixture_over(p.log_ratio(q), skew)  # log(m / q)
    value = -(q.probs * over_q).sum(-1)
    return value, (-over_q).exp_().mul_(skew).add_(over_q).mul_(q.probs).neg_()


def _log_mixture_over(ratio: Tensor, weight: float) -> Tensor:
    """log(m / first), m = weight * first + (1 - weight) * second, from ``ratio`` = log(second / first).  [N, V], nats.

    Via the ratio, since probabilities underflow, and log m - log first would subtract two large numbers and leave
    mostly rounding. It is bounded where an exponential would overflow: what multiplies it is 0 there.
    """
    bounded = ratio.clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO)
    bounded.add_(math.log1p(-weight))
    # In place unless autograd needs the intermediates: a fifth less time.
    return (bounded.exp() + weight).log() if bounded.requires_grad else bounded.exp_().add_(weight).log_()


@dataclass(frozen=True)
class Family:
    """A divergence, and the k of T^k that scales its tempered form."""

    divergence: Callable[..., ValueAndSlope]
    uniform_power: int = 2  # keeps the gradient's size steady as T rises
    published_power: int | None = None  # of the paper's code; None: it has no such divergence, k is the uniform one
    parameter: str | None = None  # the one option that the divergence takes, by its name in LossOptions


_FAMILIES = {
    "fkl": Family(forward_kl, published_power=2),
    "rkl": Family(reverse_kl, published_power=0),
    "jsd": Family(jensen_shannon, published_power=2, parameter="teacher_weight"),
    "tvd": Family(total_variation, uniform_power=1, published_power=0),
    "sfkl": Family(skew_forward_kl, published_power=0, parameter="skew"),
    "srkl": Family(skew_reverse_kl, published_power=2, parameter="skew"),
}


@dataclass(frozen=True)
class LossType:
    """What ``--type`` names: a family, plain or tempered."""

    name: str
    family: Family
    tempered: bool

    def power(self, scaling: str) -> int:
        """k of T^k under ``--loss-scaling`` uniform or published."""
        published = self.family.published_power
        return self.family.uniform_power if scaling == "uniform" or published is None else published

    def bind(self, **options: Any) -> Divergence:
        """The divergence as a function of (student, teacher), its own parameter, if any, taken from ``options``.

        If it is not given, the function's default.  Raises UserError unless it is strictly between 0 and 1.
        """
        function, name = self.family.divergence, self.family.parameter
        if name is None:
            return function
        value = options.get(name, inspect.signature(function).parameters[name].default)
        if not 0.0 < value < 1.0:
            raise UserError(f"`{name}` is {value}; {self.name} needs a value strictly between 0 and 1, such as 0.1")
        return partial(function, **{name: value})


LOSSES: dict[str, LossType] = {
    prefix + name: LossType(prefix + name, family, bool(prefix))
    for prefix in ("", "t")
    for name, family in _FAMILIES.items()
}

ALIASES: dict[str, str] = {"kd": "fkl", "ttvdf": "ttvd"}

SCALINGS = ("uniform", "published")  # of T^k, see ``Family``

SFT = "sft"  # cross-entropy alone: no teacher, no divergence


def loss_type(name: str) -> LossType | None:
    """The loss that ``--type name`` means, or None for ``sft``.

    Raises UserError for an unknown name, naming the closest one and all of them.
    """
    name = ALIASES.get(name, name)
    if name == SFT:
        return None
    if name not in LOSSES:
        known = [SFT, *LOSSES, *ALIASES]
        raise UserError(f"unknown `type` {name!r}{closest(name, known)} (known: {', '.join(known)})")
    return LOSSES[name]
