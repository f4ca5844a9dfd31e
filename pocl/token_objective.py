"""The objective of a response token, (1 - r) CE + r T^k D, and its gradient by the student's logits in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pocl.losses import Divergence, Softmax, softmax, through_softmax


@dataclass(frozen=True)
class Term:
    """The divergence of a stage: the function, its temperature T, the factor T^k, and the KD ratio r."""

    divergence: Divergence | None = None  # None: cross-entropy alone
    temperature: float = 1.0
    scale: float = 1.0
    kd_ratio: float = 0.0  # where each token has its own ratio, this is only its upper bound
    cross_entropy: bool = True  # False: the objective is the divergence's part alone, as on the student's own text

    def weights(self, kd_ratio: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """What each token's divergence is multiplied with, and its cross-entropy.  -> [N], [N], as ``like`` [N] is.

        ``kd_ratio`` [N] replaces the one of all. None for cross-entropy where it is left out, as at r = 1, so that an
        infinite one cannot turn 0 * inf into NaN.
        """
        ratio = torch.full_like(like, self.kd_ratio) if kd_ratio is None else kd_ratio
        left_out = not self.cross_entropy or (kd_ratio is None and self.kd_ratio >= 1.0)
        return ratio * self.scale, None if left_out else 1.0 - ratio


def token_objective(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    term: Term,
    kd_ratio: Tensor | None = None,
    *,
    learns: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(objective, cross-entropy, divergence) of each token, and the objective's gradient by the student's logits.

    [N, V], [N, V], [N] -> 3 x [N], [N, V] in float32 at least; no gradient unless it ``learns``.
    """
    plain = softmax(student_logits)
    tempered = plain.tempered(term.temperature)
    cross_entropy = -plain.logp_of(labels)
    if term.divergence is None or teacher_logits is None:
        gradient = None
        if learns:
            gradient = plain.probs
            gradient.scatter_add_(-1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy), gradient
    divergence, slope = term.divergence(tempered, softmax(teacher_logits, term.temperature))
    weight, weight_of_labels = term.weights(kd_ratio, cross_entropy)
    objective = weight * divergence
    gradient = None
    if learns:
        gradient = through_softmax(slope, tempered, weight[:, None] / term.temperature)
    if weight_of_labels is not None:
        objective = objective + weight_of_labels * cross_entropy
        if gradient is not None:
            _add_cross_entropy(gradient, plain, labels, weight_of_labels)
    return objective, cross_entropy, divergence, gradient


def _add_cross_entropy(gradient: Tensor, q: Softmax, labels: Tensor, weight: Tensor) -> None:
    """Add weight * (q - 1 at the label), cross-entropy's gradient by the logits.  [N, V], [N], [N]."""
    gradient.addcmul_(q.weights, weight[:, None] / q.total)
    gradient.scatter_add_(-1, labels[:, None], -weight[:, None])
