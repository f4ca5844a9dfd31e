"""A loss by its name: what ``--type`` and its options mean, for a stage of the curriculum and for one micro-batch."""

import math
import os
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from pocl.common.errors import UserError, closest
from pocl.losses.chunked import (
    LossValues,
    automatic_chunk_tokens,
    chunks_needed,
    distillation_objective,
    logits_objective,
)
from pocl.losses.divergences import ALIASES, SCALINGS, Divergence, loss_type
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective, Weights


@dataclass(frozen=True)
class DistillationLoss:
    """(1 - r) CE + r T^k D of response tokens, from hidden states and heads, and its gradient, chunk by chunk.

    ::

        loss = DistillationLoss("tfkl")
        values = loss(HiddenStates(states, head), HiddenStates(teacher_states, teacher_head), labels, temperature=2.0)
        (values.loss / num_tokens).backward()

    ``num_tokens`` is the number of response tokens in the whole optimiser step: all micro-batches, all ranks.

    Raises UserError, a ValueError, for a name or a value that does not exist.
    """

    name: str  # as ``--type`` has it: sft, fkl, ..., tfkl, ...; an alias becomes the name that it stands for
    _: KW_ONLY
    scaling: str = "uniform"  # of k: "uniform" keeps the gradient's size as T rises, "published" is the papers' code
    skew: float = 0.1  # of sfkl and srkl
    teacher_weight: float = 0.1  # of jsd
    chunk_tokens: int | None = None  # tokens whose logits exist at a time; None: by vocabulary and the device's memory
    fused: bool = False  # use the GPU kernel; ``pocl.losses.fused.why_not_fused`` says where there is none

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", ALIASES.get(self.name, self.name))
        if self.scaling not in SCALINGS:
            known = " or ".join(SCALINGS)
            raise UserError(f"unknown `scaling` {self.scaling!r}{closest(self.scaling, SCALINGS)} (known: {known})")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise UserError(f"`chunk_tokens` is {self.chunk_tokens}; it must be at least 1, or None for automatic")
        self.objective()  # raises for an unknown name and for mixture weights out of range

    @property
    def tempered(self) -> bool:
        """Whether the loss takes a temperature; the others are at T = 1."""
        found = loss_type(self.name)
        return found is not None and found.tempered

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a divergence: always but for sft."""
        return loss_type(self.name) is not None

    @property
    def divergence(self) -> Divergence | None:
        """D as a function of two ``Softmax``, its own parameter bound; None for sft."""
        found = loss_type(self.name)
        return None if found is None else found.bind(skew=self.skew, teacher_weight=self.teacher_weight)

    @property
    def power(self) -> int:
        """k of T^k; 0 for sft."""
        found = loss_type(self.name)
        return 0 if found is None else found.power(self.scaling)

    def objective(self, temperature: float = 1.0, kd_ratio: float = 1.0) -> StageObjective:
        """The objective of a stage of this T and r; sft has no r.

        Raises UserError for a T that is not positive and finite, or not 1 where the loss is not tempered, and for an r
        outside 0 to 1.
        """
        if not 0.0 < temperature < math.inf:
            raise UserError(f"`temperature` is {temperature}; it must be above 0 and finite")
        if temperature != 1.0 and not self.tempered:
            tempered = f"t{self.name}" if self.needs_teacher else "tfkl"
            raise UserError(
                f"`temperature` is {temperature}, but {self.name} has T = 1; for a temperature use {tempered}"
            )
        if not 0.0 <= kd_ratio <= 1.0:
            raise UserError(f"`kd_ratio` is {kd_ratio}; it must be 0 (cross-entropy alone) to 1 (divergence alone)")
        if not self.needs_teacher:
            return StageObjective()
        return StageObjective(self.divergence, temperature, temperature**self.power, kd_ratio)

    def named(self, name: str | None) -> "DistillationLoss":
        """The same with another divergence; None: itself."""
        return self if name in (None, self.name) else replace(self, name=name)

    def chunk_size(self, num_logits: int, device: torch.device) -> int:
        """``chunk_tokens``, or else the number of tokens whose logits fit the device."""
        if self.chunk_tokens is not None:
            return self.chunk_tokens
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return automatic_chunk_tokens(num_logits, memory, device.type)

    def __call__(
        self,
        student: HiddenStates,
        teacher: HiddenStates | None,
        labels: Tensor,
        *,
        temperature: float = 1.0,
        kd_ratio: float = 1.0,
        weights: Weights | None = None,
    ) -> LossValues:
        """The sum over N response tokens, and each one's cross-entropy and divergence.  [N, H_s], [N, H_t], [N].

        ``weights`` [N] are per token and replace r and 1 - r. The sum carries the gradients w.r.t. the student's
        states and head where gradients are enabled. sft reads no teacher.

        Raises UserError as ``objective`` does, and where a divergence gets no teacher; ValueError if numbers of rows
        or vocabularies differ.
        """
        objective = self.objective(temperature, kd_ratio)
        if self.needs_teacher and teacher is None:
            raise UserError(f"`teacher` is None, but {self.name} distils from one; give its HiddenStates, or use sft")
        chunk_tokens = self.chunk_size(student.head.num_logits, student.states.device)
        return distillation_objective(
            student,
            teacher if self.needs_teacher else None,
            labels,
            objective,
            weights=weights,
            num_chunks=chunks_needed(len(labels), chunk_tokens),
            fused=self.fused,
        )

    def of_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        temperature: float = 1.0,
        kd_ratio: float = 1.0,
        weights: Weights | None = None,
    ) -> LossValues:
        """The same from logits, for a loop that has made them anyway: they take up N x V numbers of each model.

        [N, V], [N, V], [N].  Raises as a call does.
        """
        objective = self.objective(temperature, kd_ratio)
        if self.needs_teacher and teacher_logits is None:
            raise UserError(f"`teacher_logits` is None, but {self.name} distils from a teacher; give them, or use sft")
        compared = teacher_logits if self.needs_teacher else None
        return logits_objective(student_logits, compared, labels, objective, weights)
