"""What the options come to before a model is loaded: a chunk's size, the stages and their pools, the cache's place.

Like the entry points, this file reads the options.
"""

import shutil
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from pocl import distributed
from pocl.console import show_table
from pocl.curriculum import CURRICULA, Curriculum, check_batches, plan_stages
from pocl.data import Split
from pocl.objective import automatic_chunk_tokens
from pocl.options import TrainConfig
from pocl.pools import Pools, unranked_pools
from pocl.teacher import cache_bytes

# Of a GPU's memory, for the weights of student and teacher; the rest is for what the teacher computes.
_TEACHERS_SHARE = 0.8


def with_chunk_tokens(config: TrainConfig, vocab_size: int, device: torch.device) -> TrainConfig:
    """The options with a size of chunks, where none was given: it is part of what the run is."""
    if config.loss.chunk_tokens is not None:
        return config
    chunk_tokens = automatic_chunk_tokens(vocab_size, distributed.device_memory(device), device.type)
    return replace(config, loss=replace(config.loss, chunk_tokens=chunk_tokens))


def make_stages(config: TrainConfig, num_examples: int) -> Curriculum:
    """The stages, printed before anything is trained."""
    stages = plan_stages(
        num_examples,
        curriculum=config.curriculum.curriculum,
        num_stages=config.curriculum.num_stages,
        epochs=config.curriculum.epochs,
        temperature=config.loss.temperature,
        kd_ratio=config.loss.kd_ratio,
        first_look=set(config.curriculum.difficulty) == {"snapshot"} and not config.curriculum.difficulty_file,
    )
    batch = config.optimiser.global_batch_size
    check_batches(stages, batch)
    show_table(
        f"--type {config.loss.type}, {num_examples} examples, {sum(s.steps(batch) for s in stages)} optimiser steps",
        ["stage", "easy to hard", "epochs", "T", "KD ratio", "steps an epoch", "steps"],
        [
            [s.index + 1, f"{s.pool.start + 1}–{s.pool.stop}", s.epochs, f"{s.temperature:.2f}"]
            + [f"{s.kd_ratio:.2f}", s.steps_per_epoch(batch), s.steps(batch)]
            for s in stages
        ],
    )
    return stages


def make_pools(config: TrainConfig, num_examples: int) -> Pools:
    """Which examples the stages train on, before anything is ranked."""
    return unranked_pools(
        num_examples,
        config.curriculum.curriculum,
        seed=config.optimiser.seed,
        reliance=config.loss.selective_reliance,
        threshold=config.loss.reliance_threshold,
    )


def ranks(config: TrainConfig) -> bool:
    """Whether the run orders its examples from easy to hard."""
    return CURRICULA[config.curriculum.curriculum].order == "ranked" or config.loss.selective_reliance != "off"


def wants_packing(config: TrainConfig) -> bool:
    """Whether micro-batches are to be packed, where the models can."""
    given = config.optimiser.packing
    return given == "on" or (given == "auto" and config.models.attention in ("flash_attention_2", "flex_attention"))


def offloads_teacher(config: TrainConfig, student_bytes: int, teacher_bytes: int, device: torch.device) -> bool:
    """Whether the teacher's weights stay in the CPU's memory and go to the device layer by layer."""
    if config.models.teacher_offload != "auto":
        return config.models.teacher_offload == "on"
    room = _TEACHERS_SHARE * distributed.device_memory(device)
    return device.type == "cuda" and student_bytes + teacher_bytes > room


def cache_place(config: TrainConfig, train: Split, teacher: PreTrainedModel) -> str:
    """Where the teacher's states are kept: off, auto (beside the processed data) or a folder."""
    place = config.models.teacher_cache
    if config.on_policy.on_policy != "off":
        return "off"  # text that the student writes is in no cache
    if place != "auto":
        return place
    seen_once = config.curriculum.num_stages * config.curriculum.epochs == 1
    room = distributed.broadcast(shutil.disk_usage(config.data.data_dir).free)
    return "off" if seen_once or room < 2 * cache_bytes(train, teacher) else "auto"
