"""What the options resolve to before a model is loaded: the sizes, the schedule, the cache folder.

Like the entry points, this file reads the options.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from pocl.cli.checks import stage_kd_ratios, stage_temperatures
from pocl.cli.costs import cached_numbers, micro_batch_tokens, prompts_at_once
from pocl.cli.options import TrainConfig
from pocl.common import distributed
from pocl.common.console import show_table
from pocl.common.files import read_json
from pocl.curriculum.schedule import CosineRate, Reliance, Schedule, unranked_order
from pocl.curriculum.stages import CURRICULA, limit_steps, plan_stages, with_losses
from pocl.data.dataset import Split
from pocl.difficulty.ranking import sources_of
from pocl.losses.chunked import automatic_chunk_tokens
from pocl.models.loading import DTYPES, load_config, load_skeleton
from pocl.models.teacher_cache import cache_bytes, cache_format
from pocl.models.tuning import recompute_activations

# Of a GPU's memory, for the weights of student and teacher; the rest is for what the teacher computes.
_TEACHERS_SHARE = 0.8
_CPU_TOKENS = 4096  # the default largest micro-batch on a CPU
_SIZES = (("loss", "chunk_tokens"), ("optimiser", "max_tokens"), ("generation", "eval_batch_size"))


def with_sizes(
    config: TrainConfig, vocab_size: int, device: torch.device, *, begun: Mapping[str, Any] | None = None
) -> TrainConfig:
    """The options with the sizes of what is computed at once, if not given: they are part of what defines the run.

    A run keeps the sizes with which it was ``begun`` (the options of its config.json), so that it can resume with
    another amount of memory; a new run's follow from the models and the machine.
    """
    for group, name in _SIZES:
        before = (begun or {}).get(group, {}).get(name)
        if getattr(getattr(config, group), name) is None and type(before) is int and before > 0:
            config = replace(config, **{group: replace(getattr(config, group), **{name: before})})
    memory = distributed.device_memory(device)
    loss, optimiser, generation = config.loss, config.optimiser, config.generation
    if loss.chunk_tokens is None:
        loss = replace(loss, chunk_tokens=automatic_chunk_tokens(vocab_size, memory, device.type))
    if optimiser.max_tokens is None:
        optimiser = replace(optimiser, max_tokens=_micro_batch_tokens(config, memory, device))
    if generation.eval_batch_size is None:
        count = prompts_together(config.models.model, config.models.dtype, config.data.max_length, device)
        generation = replace(generation, eval_batch_size=count)
    return replace(config, loss=loss, optimiser=optimiser, generation=generation)


def _micro_batch_tokens(config: TrainConfig, memory: int, device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_TOKENS
    with FakeTensorMode():
        student = load_skeleton(config.models.model, config.models.dtype)
        if config.models.gradient_checkpointing:
            recompute_activations(student)
        return micro_batch_tokens(student, memory)


def prompts_together(model_path: str, dtype: str, max_length: int, device: torch.device) -> int:
    """How many prompts of this model are answered together if --eval-batch-size is not given."""
    numbers = cached_numbers(load_config(model_path))
    memory = distributed.device_memory(device)
    return prompts_at_once(numbers, DTYPES[dtype].itemsize, max_length, memory, device.type)


def make_schedule(config: TrainConfig, num_examples: int) -> Schedule:
    """What is trained on at each step, before anything is ranked."""
    asks_training_alone = sources_of(config.curriculum.difficulty) == {"training"}
    stages = plan_stages(
        max(1, int(config.curriculum.keep_share * num_examples)),
        curriculum=config.curriculum.curriculum,
        num_stages=config.curriculum.num_stages,
        epochs=config.curriculum.epochs,
        temperature=stage_temperatures(config),
        kd_ratio=stage_kd_ratios(config),
        first_look=asks_training_alone and not config.curriculum.difficulty_file,
    )
    scheme, optimiser = CURRICULA[config.curriculum.curriculum], config.optimiser
    if config.loss.type_of_stage:
        stages = with_losses(stages, config.loss.type_of_stage)
    if config.curriculum.max_steps is not None:
        stages = limit_steps(stages, config.curriculum.max_steps, optimiser.global_batch_size)
    rate = CosineRate(
        optimiser.lr,
        optimiser.min_lr,
        restarts=config.curriculum.restart_optimizer,
        warmup=optimiser.warmup_steps,
        decays=optimiser.lr_schedule == "cosine",
    )
    return Schedule(
        stages,
        unranked_order(num_examples, scheme, seed=optimiser.seed),
        global_batch_size=optimiser.global_batch_size,
        seed=optimiser.seed,
        rate=rate,
        scheme=scheme,
        reliance=Reliance(config.loss.selective_reliance, config.loss.reliance_threshold),
        weighs=config.loss.weighting == "paced",
    )


def show_schedule(schedule: Schedule, type_name: str) -> None:
    """Print the stages."""
    show_table(
        f"--type {type_name}, {len(schedule.order)} examples, {schedule.total_steps} optimiser steps",
        ["stage", "easy to hard", "epochs", "T", "KD ratio", "steps/epoch", "steps"],
        [
            [s.index + 1, f"{s.pool.start + 1}–{s.pool.stop}", s.epochs, f"{s.temperature:.2f}", f"{s.kd_ratio:.2f}"]
            + [schedule.steps_per_epoch(s), s.steps(schedule.global_batch_size)]
            for s in schedule.stages
        ],
    )


def needs_ranking(config: TrainConfig) -> bool:
    """Whether the run orders its examples from easy to hard."""
    ordered = CURRICULA[config.curriculum.curriculum].order == "ranked"
    return ordered or config.loss.selective_reliance != "off" or config.loss.weighting != "off"


def wants_packing(config: TrainConfig) -> bool:
    """Whether micro-batches are to be packed, if the models can be."""
    given = config.optimiser.packing
    return given == "on" or (given == "auto" and config.models.attention not in ("sdpa", "eager"))


def offloads_teacher(config: TrainConfig, student_bytes: int, teacher_bytes: int, device: torch.device) -> bool:
    """Whether the teacher's weights stay in the CPU's memory and go to the device layer by layer."""
    if config.models.teacher_offload != "auto":
        return config.models.teacher_offload == "on"
    room = _TEACHERS_SHARE * distributed.device_memory(device)
    return device.type == "cuda" and student_bytes + teacher_bytes > room


def cache_place(config: TrainConfig, train: Split, teacher: PreTrainedModel, *, made: bool = False) -> str:
    """Where the teacher's states are kept: off, auto (beside the processed data) or a folder.

    ``made``: they are already beside the data and need no more room.
    """
    place = config.models.teacher_cache
    if config.on_policy.on_policy != "off":
        return "off"  # text that the student writes is in no cache
    if place != "auto":
        return place
    seen_once = config.curriculum.num_stages * config.curriculum.epochs == 1 and config.curriculum.max_steps is None
    room = distributed.broadcast(shutil.disk_usage(config.data.data_dir).free)
    return "off" if not made and (seen_once or room < 2 * cache_bytes(train, teacher)) else "auto"


def finished_cache(config: TrainConfig, train: Split, teacher: PreTrainedModel) -> Path | None:
    """A finished cache of these texts by a teacher of this width and dtype: its weights are not compared."""
    given, beside = config.models.teacher_cache, Path(config.data.data_dir) / "teacher-cache"
    wanted = train.key | cache_format(teacher)
    for manifest in sorted(beside.glob("*/manifest.json")) if given == "auto" else [Path(given) / "manifest.json"]:
        if manifest.is_file() and wanted.items() <= read_json(manifest).items():
            return manifest.parent
    return None
