"""The settings and loops under which a trainer would not follow a curriculum, refused before the first step."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerState, TrainingArguments

from pocl.common.errors import UserError
from pocl.curriculum.schedule import Schedule

OLDEST = {"transformers": "5.0", "trl": "1.10"}  # tried; older ones lack what is hooked into


def check_version(package: str) -> None:
    """Raise UserError for a transformers or trl that is too old to be led."""
    found, oldest = version(package), OLDEST[package]
    if Version(found) < Version(oldest):
        raise UserError(f'{package} {found} is too old for a curriculum; pip install --upgrade "{package}>={oldest}"')


def check_arguments(schedule: Schedule, trainer: Trainer) -> None:
    """Raise UserError for a setting under which the trainer would not follow the curriculum."""
    args = trainer.args
    if trainer.train_dataset is None:
        raise UserError("the trainer has no `train_dataset`; give it one")
    if not hasattr(trainer.train_dataset, "__len__"):
        raise UserError(
            "`train_dataset` is an iterable data set, of which trainers drop or reorder examples; give a "
            "`datasets.Dataset` in memory"
        )
    if getattr(args, "packing", False) or getattr(args, "padding_free", False):
        raise UserError("`packing` mixes or reorders examples; set `packing` and `padding_free` to False")
    if getattr(args, "train_sampling_strategy", None) in ("group_by_length", "batch_rebalance"):
        raise UserError("`train_sampling_strategy` reorders examples by length; set it to 'sequential'")
    if getattr(args, "group_by_length", False):  # what transformers 5.0 has instead
        raise UserError("`group_by_length` reorders examples by length; set it to False")
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if per_step != schedule.global_batch_size or args.n_gpu > 1:
        raise UserError(
            f"the trainer takes {args.per_device_train_batch_size} examples x {args.gradient_accumulation_steps} "
            f"accumulated x {args.world_size} processes a step, the schedule {schedule.global_batch_size}; change "
            f"`per_device_train_batch_size` or `gradient_accumulation_steps`, with one process a GPU"
        )
    if args.max_steps not in (-1, schedule.total_steps) or (args.max_steps == -1 and args.num_train_epochs != 1):
        raise UserError(
            f"the trainer would take {args.num_train_epochs} epochs or {args.max_steps} steps, the curriculum is one "
            f"epoch of {schedule.total_steps} steps; set `num_train_epochs` to 1 and leave `max_steps` at -1"
        )
    _check_processes(args)
    _check_selection(schedule, args)


def _check_processes(args: TrainingArguments) -> None:
    config = args.accelerator_config
    if args.world_size > 1 and config.split_batches:
        raise UserError("`split_batches` makes batches of another size; set it to False in `accelerator_config`")
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise UserError(
            "without `average_tokens_across_devices` every process divides by tokens of its own; set it to True"
        )
    if args.ignore_data_skip:
        raise UserError("`ignore_data_skip` would begin again with the easiest examples; set it to False")
    if getattr(args, "auto_find_batch_size", False):
        raise UserError("`auto_find_batch_size` changes the batch that the schedule counts in; set it to False")


def _check_selection(schedule: Schedule, args: TrainingArguments) -> None:
    """Refuse a best checkpoint by the loss across stages: T differs, and dev losses rise while answers get better."""
    by_loss = args.metric_for_best_model in (None, "loss", "eval_loss")
    chooses = args.load_best_model_at_end or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best"
    if chooses and by_loss and len(schedule.stages) > 1:
        raise UserError(
            "`load_best_model_at_end` by `eval_loss` compares losses of different stages; set `metric_for_best_model` "
            "to a measure of answers, or `load_best_model_at_end` to False"
        )


def check_loop(schedule: Schedule, state: TrainerState, loader: Any) -> None:
    """Raise UserError for a loop of other steps than the schedule's, or a data loader with an order of its own."""
    if state.max_steps != schedule.total_steps or state.num_train_epochs != 1:
        raise UserError(
            f"the trainer would take {state.max_steps} steps in {state.num_train_epochs} epochs, the curriculum "
            f"{schedule.total_steps} in one; set `num_train_epochs` to 1 and leave `max_steps` at -1"
        )
    if not any(map(_keeps_order, _parts(loader))):
        raise UserError(
            "the trainer's data loader does not read its data set in order; do not override `get_train_dataloader`"
        )


def _keeps_order(sampler: Any) -> bool:
    return isinstance(sampler, SequentialSampler) or (hasattr(sampler, "repeat_count") and not sampler.shuffle)


def _parts(loader: Any) -> Iterator[Any]:
    """A data loader and its samplers, also those that stand behind accelerate's shards."""
    waiting, seen = [loader], set()
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
