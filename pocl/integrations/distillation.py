"""A Trainer of transformers with the project's objective: chunked, from hidden states, the teacher cached or not."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from pocl.common import distributed
from pocl.common.errors import UserError
from pocl.curriculum.schedule import Update
from pocl.curriculum.stages import Stage
from pocl.data.batch import IGNORE, Batch
from pocl.data.dataset import Split
from pocl.integrations.transformers import Curriculum
from pocl.integrations.visits import Visit, Visits
from pocl.losses import DistillationLoss, HiddenStates, StageObjective
from pocl.losses.token import Weights
from pocl.models.student import Student
from pocl.models.teacher import Teacher
from pocl.training.module import StudentObjective
from pocl.training.student import Factors


class DistillationTrainer(Trainer):
    """(1 - r) CE + r T^k D along a curriculum, in transformers' loop.

    ::

        trainer = DistillationTrainer(student, teacher, curriculum, loss, args=args, train=train)
        trainer.train()

    The loss is the sum over response tokens divided by their number in the whole optimiser step (all micro-batches,
    all ranks). ``eval_loss`` is the cross-entropy of the references, whatever the stage's T and r [nats per token].
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        curriculum: Curriculum,
        loss: DistillationLoss,
        *,
        args: TrainingArguments,
        train: Split,
        **others: Any,
    ) -> None:
        """``others`` are Trainer's own, such as ``callbacks``; its ``eval_dataset`` is a Split here.

        Raises UserError if the loss wants a teacher and there is none, or as ``Curriculum.attach`` does.
        """
        _check(teacher, curriculum, loss, args)
        if others.get("eval_dataset") is not None:
            others["eval_dataset"] = Visits(others["eval_dataset"], np.arange(len(others["eval_dataset"])))
        args.remove_unused_columns = False
        collator = TensorsOf(train.max_length if args.accelerator_config.dispatch_batches else None)
        super().__init__(
            student.model, args, collator, train_dataset=train, processing_class=student.tokenizer, **others
        )
        self.model_accepts_loss_kwargs = True  # so that the step's tokens are counted
        self.teacher, self.loss, self.curriculum = teacher, loss, curriculum
        chunk_tokens = loss.chunk_size(student.head.num_logits, args.device)
        whole = student.model
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole  # peft's adapters are in it
        self._objective = StudentObjective(base, student.head, chunk_tokens=chunk_tokens, fused=loss.fused)
        self._stage = StageObjective()
        # Cross-entropy, divergence and response tokens since the last log.
        self._sums = torch.zeros(3, dtype=torch.float64, device=args.device)
        curriculum.attach(self)

    def follow(self, update: Update) -> None:
        """Take the divergence, T and r of a step's stage."""
        self._stage = _objective_of(update.stage, self.loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective of a micro-batch, as a part of the step's mean per response token; no model outputs."""
        batch, learns = _batch_of(inputs), model.training
        stage, teacher, weights = StageObjective(), None, None
        if learns:
            stage, weights = self._stage, self._weights(inputs["positions"])
            teacher = HiddenStates(self.teacher.states(batch), self.teacher.head) if self.teacher else None
        with self.accelerator.autocast():
            loss, cross_entropy, divergence = through_wrapper(
                model,
                self.accelerator.unwrap_model(model),
                self._objective.forward,
                (batch, stage, teacher, weights),
            )
        num_tokens = len(cross_entropy)
        if learns:
            sums = cross_entropy.double().sum(), divergence.double().sum(), torch.tensor(float(num_tokens))
            self._sums += torch.stack([value.to(self._sums) for value in sums])
            loss = loss * (self.accelerator.num_processes / num_items_in_batch)  # gradients are averaged over ranks
        else:
            loss = loss / max(1, num_tokens)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's values, and the mean cross-entropy and divergence since the last time [nats per token]."""
        if "loss" in logs:
            *sums, tokens = distributed.sum_over_ranks(self._sums.tolist(), self.args.device)
            names = ("cross_entropy", "divergence")
            logs |= {name: value / max(1.0, tokens) for name, value in zip(names, sums, strict=True)}
            self._sums.zero_()
        super().log(logs, *args, **kwargs)

    def _weights(self, positions: Tensor) -> Weights | None:
        """The weights of each example under selective reliance or PACED [B]; None if they are the stage's for all."""
        schedule = self.curriculum.schedule
        factors = Factors(schedule.ratio_factors, schedule.weights)
        if factors.ratio is None and factors.loss is None:
            return None
        ratio, weight = factors.of(positions.cpu().numpy())
        ratio = self._stage.kd_ratio * ratio
        both = torch.from_numpy(np.stack([weight * ratio, weight * (1.0 - ratio)])).float()
        return Weights(*both.to(positions.device).unbind())


class TensorsOf:
    """Visits to a batch of tensors, as transformers' Trainer and accelerate want them."""

    def __init__(self, width: int | None) -> None:
        """``width`` pads all batches alike, which accelerate needs to send them from one process to the others."""
        self.width = width

    def __call__(self, visits: Sequence[Visit]) -> dict[str, Tensor]:
        """The visited examples; ``labels`` as transformers has them, those of a token at its own place."""
        positions = [visit.position for visit in visits]
        batch = visits[0].split.batch(positions)
        extra = 0 if self.width is None else self.width - batch.input_ids.shape[1]
        pad = torch.nn.functional.pad
        return {
            "positions": torch.tensor(positions),
            "example_ids": batch.example_ids,
            "input_ids": pad(batch.input_ids, (0, extra)),
            "attention_mask": pad(batch.attention_mask, (0, extra)),
            "labels": pad(batch.labels, (1, extra), value=IGNORE),
        }


def _batch_of(inputs: dict[str, Tensor]) -> Batch:
    """What ``TensorsOf`` made, as a Batch, on the device where it is."""
    labels = inputs["labels"][:, 1:].contiguous()
    num_labels = (labels != IGNORE).sum(-1).cpu()
    return Batch.of(inputs["example_ids"].cpu(), num_labels, inputs["input_ids"], inputs["attention_mask"], labels)


def through_wrapper(wrapper: nn.Module, model: nn.Module, method: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """``method(*arguments)``, run in the place of the model's forward by what wraps it (DDP, DeepSpeed, or nothing).

    Calling a part of the model instead would go around the wrapper, which then synchronises no gradients.
    Source: the forward redirection of PyTorch Lightning, which TRL uses, too.
    """
    own = vars(model).get("forward")

    def restore() -> None:
        vars(model).pop("forward", None)
        if own is not None:
            vars(model)["forward"] = own

    def instead(*given: Any) -> Any:
        restore()
        return method(*given)

    vars(model)["forward"] = instead
    try:
        return wrapper(*arguments)
    finally:
        restore()


def _objective_of(stage: Stage, loss: DistillationLoss) -> StageObjective:
    return loss.named(stage.loss).objective(stage.temperature, stage.kd_ratio)


def _check(teacher: Teacher | None, curriculum: Curriculum, loss: DistillationLoss, args: TrainingArguments) -> None:
    """Raise UserError for parts that do not fit each other."""
    if loss.needs_teacher and teacher is None:
        raise UserError(f"`teacher` is None, but {loss.name} distils from one; give a Teacher, or the loss sft")
    if teacher is not None and teacher.device.type != args.device.type:
        raise UserError(f"`teacher` is on {teacher.device}, the trainer on {args.device}; open it with that `device`")
    for stage in curriculum.schedule.stages:
        _objective_of(stage, loss)  # raises for what the loss does not take
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        raise UserError("`deepspeed` has ZeRO stage 3, which train.py trains with; use stage 0 to 2 here")
    if args.fsdp:
        raise UserError("`fsdp` shards the student's head, which the chunked objective reads; use DeepSpeed or DDP")
