"""The objective of a response token, (1 - r) CE + r T^k D, and its gradient in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pocl.losses.divergences import Divergence, Softmax, softmax, through_softmax


@dataclass(frozen=True)
class Weights:
    """The weights of divergence and cross-entropy in the objective, per token [N] or per example [B].

    They replace the stage's r and 1 - r: under selective reliance r differs between examples, and on the student's own
    text there may be no cross-entropy.
    """

    divergence: Tensor  # r; T^k comes on top
    cross_entropy: Tensor

    def __getitem__(self, rows: slice) -> "Weights":
        return Weights(self.divergence[rows], self.cross_entropy[rows])


@dataclass(frozen=True)
class StageObjective:
    """The objective of a stage: the divergence, its temperature T, the factor T^k, and the KD ratio r."""

    divergence: Divergence | None = None  # None: cross-entropy alone
    temperature: float = 1.0
    scale: float = 1.0
    kd_ratio: float = 0.0

    def weights(self, given: Weights | None, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each token's weight of the divergence, and of the cross-entropy.  -> [N], [N], like ``like`` [N].

        ``given`` replaces the stage's. None for cross-entropy at the stage's r = 1: 0 times an infinite one is NaN.
        """
        if given is not None:
            return given.divergence * self.scale, given.cross_entropy
        weight = torch.full_like(like, self.kd_ratio * self.scale)
        return weight, None if self.kd_ratio >= 1.0 else torch.full_like(like, 1.0 - self.kd_ratio)


def token_objective(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    objective: StageObjective,
    weights: Weights | None = None,
    *,
    learns: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, cross-entropy, divergence) of each token, and the loss's gradient w.r.t. the student's logits.

    [N, V], [N, V], [N] -> 3 x [N], [N, V] in float32 at least; no gradient unless ``learns``.
    """
    plain = softmax(student_logits)
    tempered = plain.tempered(objective.temperature)
    cross_entropy = -plain.logp_of(labels)
    if objective.divergence is None or teacher_logits is None:
        gradient = None
        if learns:
            gradient = plain.probs
            gradient.scatter_add_(-1, labels[:, None], gradient.new_full((len(labels), 1), -1.0))
        return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy), gradient
    divergence, slope = objective.divergence(tempered, softmax(teacher_logits, objective.temperature))
    weight, weight_of_labels = objective.weights(weights, cross_entropy)
    loss = weight * divergence
    gradient = None
    if learns:
        gradient = through_softmax(slope, tempered, weight[:, None] / objective.temperature)
    if weight_of_labels is not None:
        loss = loss + weight_of_labels * cross_entropy
        if gradient is not None:
            _add_cross_entropy(gradient, plain, labels, weight_of_labels)
    return loss, cross_entropy, divergence, gradient


def _add_cross_entropy(gradient: Tensor, q: Softmax, labels: Tensor, weight: Tensor) -> None:
    """Add weight * (q - 1 at the label), cross-entropy's gradient w.r.t. the logits.  [N, V], [N], [N]."""
    gradient.addcmul_(q.weights, weight[:, None] / q.total)
    gradient.scatter_add_(-1, labels[:, None], -weight[:, None])
