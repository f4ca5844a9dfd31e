"""A ranking and a schedule, flattened into the one epoch that transformers' Trainer goes through.

The Trainer makes its data loader once and counts an epoch's steps once, so stages cannot be epochs of it. Here every
stage and epoch, each cut to whole global batches, follows the last in one list of examples; which stage a step belongs
to is read from the schedule by the step's number.
"""

from collections.abc import Callable, Hashable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pocl.common.errors import UserError
from pocl.common.files import read_jsonl
from pocl.curriculum.schedule import Schedule, Update
from pocl.data.dataset import Split
from pocl.difficulty.ranking import Ranking
from pocl.integrations.checks import check_arguments, check_loop, check_version
from pocl.integrations.visits import ID, Visits, ids_of, order_of
from pocl.losses import DistillationLoss
from pocl.training.moments import clear_moments


class Curriculum:
    """Which examples a trainer sees at each optimiser step, and at which temperature, KD ratio and learning rate.

    ::

        curriculum = Curriculum("results/run/difficulty.jsonl", schedule)
        curriculum.attach(trainer)   # flattens the trainer's data set, unless ``select`` did it before

    ``ranking`` is a Ranking or the path of a difficulty.jsonl. It is applied to the ``schedule`` by the ids of the
    data set, so the schedule's own order counts only where its scheme does not follow a ranking.
    """

    def __init__(self, ranking: Ranking | str | Path, schedule: Schedule) -> None:
        self._records = ranking.records if isinstance(ranking, Ranking) else read_jsonl(Path(ranking))
        self.schedule = schedule
        self._ids: list[Hashable] | None = None  # of the data set that was selected from

    def select(self, dataset: Any) -> Any:
        """The examples of every stage and epoch in turn, as one data set.

        ``dataset`` is a ``datasets.Dataset`` with a column ``id``, or a Split; the global batches of a Split are
        sorted from the longest example to the shortest, so that little is padded.  Raises UserError if it cannot be
        reordered, has no ids, or holds other examples than the ranking or another number than the schedule.
        """
        ids = ids_of(dataset)
        order = order_of(self._records, ids)
        if len(self.schedule.order) != len(ids):
            raise UserError(
                f"`schedule` is made for {len(self.schedule.order)} examples, the data set holds {len(ids)}; make its "
                f"stages for {len(ids)}"
            )
        self.schedule, self._ids = self.schedule.rank(order), ids
        self.__dict__.pop("updates", None)
        if isinstance(dataset, Split):
            return Visits(dataset, self.positions(dataset.lengths))
        return dataset.select(self.positions())

    @cached_property
    def updates(self) -> tuple[Update, ...]:
        """Every optimiser step of the schedule."""
        return tuple(self.schedule)

    def positions(self, lengths: np.ndarray | None = None) -> np.ndarray:
        """The positions of all visits in the data set, global batch by global batch.  -> [steps x G].

        ``lengths`` [N] sorts the examples of each global batch from the longest to the shortest.
        """
        batches = [update.examples for update in self.updates]
        if lengths is not None:
            batches = [batch[np.argsort(-lengths[batch], kind="stable")] for batch in batches]
        return np.concatenate(batches)

    def attach(self, trainer: Trainer, loss: DistillationLoss | None = None) -> None:
        """Let the curriculum lead a transformers Trainer, or one of TRL's: its order, learning rate, T and KD ratio.

        ``loss`` is the objective of TRL's GKDTrainer and GOLDTrainer (default: tfkl), whose own it replaces.  Raises
        UserError for a trainer of another kind, or a setting that would break the curriculum.
        """
        if not isinstance(trainer, Trainer):
            kind = type(trainer).__name__
            raise UserError(f"{kind} is no transformers Trainer; a loop of another kind can go through `Schedule`")
        check_version("transformers")
        check_arguments(self.schedule, trainer)
        apply = _adapter(trainer, loss)
        if self.schedule.weights is not None and not hasattr(trainer, "curriculum"):
            kind = type(trainer).__name__
            raise UserError(f"the schedule weighs examples, which {kind} does not; use pocl.DistillationTrainer")
        if self._ids is None:
            trainer.train_dataset = self.select(trainer.train_dataset)
        self._check_selected(trainer.train_dataset)
        trainer._get_train_sampler = _in_order(trainer, trainer._get_train_sampler)
        # First: what it adds to the log reaches the trainer's other callbacks.
        trainer.callback_handler.callbacks.insert(0, FollowCurriculum(self, apply))

    def _check_selected(self, dataset: Any) -> None:
        """Raise UserError unless these are the examples that ``select`` returned, in their order."""
        wanted = self.schedule.total_steps * self.schedule.global_batch_size
        if len(dataset) != wanted:
            raise UserError(
                f"the trainer's data set has {len(dataset)} examples, the curriculum goes through {wanted}; give the "
                f"trainer `train_dataset`=curriculum.select(dataset), and nothing that packs or filters it"
            )
        ids = self._ids or []
        known = ID in getattr(dataset, "column_names", ())
        if known and list(dataset[ID]) != [ids[position] for position in self.positions().tolist()]:
            raise UserError(
                "the trainer's data set is not in the curriculum's order; set `shuffle_dataset` to False, or leave "
                "out `select`, which `attach` calls by itself"
            )


class FollowCurriculum(TrainerCallback):
    """Sets the learning rate, T and KD ratio before each optimiser step, restarts AdamW, and logs the stage."""

    def __init__(self, curriculum: Curriculum, apply: Callable[[Update], None]) -> None:
        """``apply`` gives the trainer a step's T and KD ratio."""
        self.curriculum, self.apply = curriculum, apply

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a loop of other steps or in another order."""
        check_loop(self.curriculum.schedule, state, kwargs["train_dataloader"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the trainer what this step is to be."""
        update, optimizer = self.curriculum.updates[state.global_step], kwargs["optimizer"]
        if update.restarts and self.curriculum.schedule.rate.restarts:
            clear_moments(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = update.lr
        self.apply(update)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the stage, the pool, T, the KD ratio and the learning rate of the last step to the trainer's values."""
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        update = self.curriculum.updates[max(0, state.global_step - 1)]
        stage = update.stage
        values = {"stage": stage.index, "pool": len(stage.pool), "temperature": stage.temperature}
        values |= {"kd_ratio": stage.kd_ratio, "learning_rate": update.lr}
        logs.update(values)
        state.log_history[-1].update(values)


def _adapter(trainer: Trainer, loss: DistillationLoss | None) -> Callable[[Update], None]:
    """What gives this trainer the T and KD ratio of a step; nothing, if it has neither."""
    if hasattr(trainer, "follow"):
        follow: Callable[[Update], None] = trainer.follow
        return follow
    if any(kind.__module__.split(".")[0] == "trl" for kind in type(trainer).__mro__):
        from pocl.integrations.trl import adapt

        return adapt(trainer, loss)
    if loss is not None:
        raise UserError(
            f"{type(trainer).__name__} computes a loss of its own, so `loss` would have no effect; leave it out, or "
            f"use pocl.DistillationTrainer"
        )
    return lambda update: None


def _in_order(trainer: Trainer, original: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer's ``_get_train_sampler`` that keeps the data set's order.

    TRL's RepeatSampler, which yields each batch as often as gradients are accumulated, stays, without its shuffling.
    """

    def sampler(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if hasattr(found, "repeat_count"):
            found.shuffle = False
            return found
        return SequentialSampler(trainer.train_dataset)

    return sampler
