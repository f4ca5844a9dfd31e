"""TRL's trainers under a curriculum: the objective through the hook that they read at every step, or T and weights.

| trainer | order, learning rate | objective |
|---|---|---|
| SFTTrainer | yes | its own cross-entropy: T and the KD ratio are logged, and have no effect |
| GKDTrainer, GOLDTrainer | yes | (1 - r) CE + r T^k D, by ``DistillationLoss``; ``beta`` has no effect |
| GOLDTrainer across vocabularies (ULD) | yes | ULD's own, with the stage's T, and 1 - r as the weight of CE |
| DistillationTrainer | yes, of prompts | its own on the student's text, with the stage's T; no KD ratio |

TRL divides by the tokens of the whole step but leaves out that gradients are averaged: with two processes the gradient
of GKDTrainer is half as large as with one, that of GOLDTrainer also with two accumulated micro-batches. Its tokens are
the data's, also where it trains on sampled text. ULD's loss is a mean of a micro-batch, of which two make it twice as
large. The objective here is divided by the tokens that are trained on, ULD's by the number of micro-batches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pocl.common.errors import UserError
from pocl.curriculum.schedule import Update
from pocl.curriculum.stages import Stage
from pocl.data.batch import IGNORE
from pocl.integrations.checks import check_version
from pocl.integrations.texts import Buffered, SampledFirst
from pocl.losses import DistillationLoss
from pocl.losses.token import Weights

Apply = Callable[[Update], None]  # gives a trainer the T and KD ratio of a step


def adapt(trainer: Any, loss: DistillationLoss | None) -> Apply:
    """What gives one of TRL's trainers the T and KD ratio of a step; its objective is replaced where ``loss`` is used.

    Raises UserError for a TRL that is too old, a trainer that no adapter knows, and a ``loss`` where the trainer keeps
    its own.
    """
    check_version("trl")
    for kind in type(trainer).__mro__:
        if kind.__name__ in ADAPTERS and kind.__module__.split(".")[0] == "trl":
            return ADAPTERS[kind.__name__](trainer, loss)
    known = ", ".join(ADAPTERS)
    raise UserError(f"no adapter for {type(trainer).__name__} (known: {known}); pocl.DistillationTrainer distils, too")


def _supervised(trainer: Any, loss: DistillationLoss | None) -> Apply:
    """Cross-entropy alone: nothing to set."""
    _no_loss(trainer, loss)
    return lambda update: None


def _generalised(trainer: Any, loss: DistillationLoss | None) -> Apply:
    """GKDTrainer, and GOLDTrainer with one vocabulary: their ``generalized_jsd_loss`` is looked up at every step."""
    if getattr(trainer, "use_liger_gkd_loss", False):  # up to TRL 1.13
        raise UserError("`use_liger_kernel` computes a loss of its own; set it to False")
    objective = _Objective(trainer, DistillationLoss("tfkl") if loss is None else loss)
    trainer.generalized_jsd_loss = objective
    return objective.follow


def _gold(trainer: Any, loss: DistillationLoss | None) -> Apply:
    """GOLDTrainer: as GKDTrainer, or by ULD across vocabularies."""
    if not (trainer.use_uld_loss and trainer.teacher_tokenizer is not None):
        return _generalised(trainer, loss)
    _no_loss(trainer, loss)
    uld = trainer.uld_loss_fn
    trainer.model_accepts_loss_kwargs = False  # so that it is divided by the number of micro-batches

    def follow(update: Update) -> None:
        uld.student_temperature = uld.teacher_temperature = update.stage.temperature
        uld.crossentropy_weight, uld.distillation_weight = 1.0 - update.stage.kd_ratio, update.stage.kd_ratio

    return follow


def _on_policy(trainer: Any, loss: DistillationLoss | None) -> Apply:
    """DistillationTrainer: its temperature is that of the divergence; sampling keeps the one it was made with."""
    _no_loss(trainer, loss)

    def follow(update: Update) -> None:
        trainer.temperature = update.stage.temperature

    return follow


ADAPTERS: dict[str, Callable[[Any, DistillationLoss | None], Apply]] = {
    "GOLDTrainer": _gold,
    "GKDTrainer": _generalised,
    "DistillationTrainer": _on_policy,
    "SFTTrainer": _supervised,  # last: GKDTrainer and GOLDTrainer are made from it
}


class _Objective:
    """(1 - r) CE + r T^k D of a micro-batch's logits, in the place of ``generalized_jsd_loss``.

    On text that the student has sampled, there is no cross-entropy.
    """

    def __init__(self, trainer: Any, loss: DistillationLoss) -> None:
        self.trainer, self.loss = trainer, loss
        self.stage: Stage | None = None  # before the first step
        self._texts = Buffered(trainer) if hasattr(trainer, "_fill_buffer") else SampledFirst(trainer)

    def follow(self, update: Update) -> None:
        """Take the divergence, T and r of a step's stage."""
        self.stage = update.stage

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Tensor:
        """[B, T, V], [B, T, V], [B, T] -> []; ``others`` are what the hook's own divergence reads."""
        learnt, stage, learns = labels != IGNORE, self.stage, self.trainer.model.training
        values = self.loss.named(stage.loss if stage else None).of_logits(
            student_logits[learnt],
            teacher_logits[learnt],
            labels[learnt],
            temperature=stage.temperature if stage else 1.0,
            kd_ratio=stage.kd_ratio if stage else 1.0,
            weights=self._weights(int(learnt.sum()), student_logits) if learns else None,
        )
        if not learns or num_items_in_batch is None:
            return values.loss / learnt.sum().clamp_min(1)
        # Gradients are averaged over processes.
        scale = self.trainer.accelerator.num_processes / self._texts.num_tokens(num_items_in_batch)
        return values.loss * torch.as_tensor(scale, device=labels.device)

    def _weights(self, num_tokens: int, like: Tensor) -> Weights | None:
        """Without cross-entropy where the student has sampled the text [N]; None: the stage's."""
        if not self._texts.written_by_student() or self.stage is None:
            return None
        ratio = torch.full((num_tokens,), self.stage.kd_ratio, device=like.device)
        return Weights(ratio, torch.zeros_like(ratio))


def _no_loss(trainer: Any, loss: DistillationLoss | None) -> None:
    if loss is not None:
        name = type(trainer).__name__
        raise UserError(f"{name} keeps a loss of its own, so `loss` would have no effect; leave it out")
