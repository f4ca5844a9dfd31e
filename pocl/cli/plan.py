"""``train.py --plan``: print what a run would take, and refuse one that does not fit this machine.

An entry point of its own, so it reads the options; the arithmetic is in pocl/cli/costs.py.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from pocl.cli.costs import (
    ModelSize,
    Workload,
    activation_bytes,
    answering_bytes,
    count_stage,
    forward_work,
    matmul_rate,
    objective_bytes,
    one_pass,
    sketch,
    state_bytes,
    total,
    training_work,
    with_adapters,
)
from pocl.cli.options import TrainConfig
from pocl.cli.resolve import (
    cache_place,
    finished_cache,
    make_schedule,
    needs_ranking,
    offloads_teacher,
    show_schedule,
    wants_packing,
)
from pocl.common import distributed
from pocl.common.console import say, show_table
from pocl.common.errors import UserError
from pocl.curriculum.stages import Curriculum
from pocl.data.dataset import Split
from pocl.data.micro_batches import OVERHEAD_TOKENS, MicroBatchLimits, micro_batches
from pocl.difficulty.ranking import COLUMNS, columns_of, sources_of
from pocl.models.loading import DTYPES, load_skeleton
from pocl.models.lora import target_layers
from pocl.models.packing import never_packed
from pocl.models.teacher_cache import cache_bytes
from pocl.training.run_folder import RunFolder


@dataclass(frozen=True)
class Costs:
    """What a plan reports: bytes per rank in each phase by component, FLOPs of all ranks by part, bytes on disk."""

    phases: Mapping[str, Mapping[str, int]]
    work: Mapping[str, float]
    cache: int  # 0: the teacher is online, or there is none
    found: Path | None = None  # a finished cache that already exists


def show_plan(
    config: TrainConfig,
    run: RunFolder,
    train: Split,
    *,
    zero: Mapping[str, Any],
    prepare: Callable[[PreTrainedModel], None],
    device: torch.device,
) -> None:
    """Print what the run would take: steps, tokens, memory, disk, time.

    ``zero`` is DeepSpeed's ``zero_optimization``; ``prepare`` readies a student for training, except for adapters:
    these are counted, not added (the activations are those of training all weights, which are about the same).
    Raises UserError if the run does not fit this machine.
    """
    schedule = make_schedule(config, len(train))
    show_schedule(schedule, config.loss.type)
    stages = schedule.stages
    fake = FakeTensorMode()
    with fake:
        student = load_skeleton(config.models.model, config.models.dtype)
        prepare(student)
        teacher = load_skeleton(config.models.teacher, config.models.dtype) if config.models.teacher else None
    packed = wants_packing(config) and not any(never_packed(model, device) for model in (student, teacher) if model)
    amount, exact = _amount(config, run, train, stages, device, packed=packed)
    with fake:
        activations, shape = max(
            (activation_bytes(student, *shape, device_type=device.type), shape) for shape in amount.largest
        )
        width = student.config.hidden_size
        sketches = sketch(student), None if teacher is None else sketch(teacher)
        if config.lora.lora_rank:
            layers = [layer for _, layer in target_layers(student, config.lora.lora_targets)]
            sketches = with_adapters(sketches[0], layers, config.lora.lora_rank), sketches[1]
    # Outside FakeTensorMode: the ranks agree through real tensors.
    found = None if teacher is None else finished_cache(config, train, teacher)
    place = "off" if teacher is None else cache_place(config, train, teacher, made=found is not None)
    cache = 0 if teacher is None or place == "off" else cache_bytes(train, teacher)
    offloaded = sketches[1] is not None and offloads_teacher(
        config, sketches[0].parameters * sketches[0].itemsize, sketches[1].parameters * sketches[1].itemsize, device
    )
    states = state_bytes(sketches[0], zero, num_ranks=distributed.world_size(), on_gpu=device.type == "cuda")
    costs = Costs(
        _phases(
            config, *sketches, states, activations, cached=cache > 0, offloaded=offloaded, device_type=device.type
        ),
        _work(config, run, train, stages, *sketches, amount, cached=cache > 0, to_cache=found is None),
        cache,
        found if cache else None,
    )
    passes = _teacher_passes(config, stages, sketches[1], amount, train, cached=cache > 0)
    _show_amount(config, amount, exact, teacher_passes=passes)
    memory = distributed.device_memory(device)
    _show_memory(costs, memory, shape)
    _show_work(config, costs, width, device)
    _check_fit(config, costs, memory, zero.get("stage", 0))


def _amount(
    config: TrainConfig, run: RunFolder, train: Split, stages: Curriculum, device: torch.device, *, packed: bool
) -> tuple[Workload, bool]:
    """(what all stages feed through the student, whether that is exact: it is once the ranking is known)."""
    given = config.curriculum
    ranking = Path(given.difficulty_file) if given.difficulty_file else run.ranking("difficulty")
    known = given.difficulty_file is not None or ranking.is_file()
    pools = make_schedule(config, len(train))
    exact = (known and given.rerank == "off") or pools.scheme.order != "ranked"
    cut = partial(
        micro_batches,
        lengths=train.lengths,
        limits=MicroBatchLimits(
            config.optimiser.max_tokens, config.optimiser.batch_size, OVERHEAD_TOKENS[device.type], packed
        ),
        rank=0,
        world_size=distributed.world_size(),
    )
    amounts = [
        count_stage(
            stage,
            partial(pools.examples, stage, seed=config.optimiser.seed),
            train,
            global_batch_size=config.optimiser.global_batch_size,
            cut=cut,
            num_ranks=distributed.world_size(),
            packed=packed,
        )
        for stage in stages
    ]
    return total(amounts), exact


def _rankings(config: TrainConfig, stages: Curriculum) -> int:
    """How many times the run ranks its examples, including the first."""
    if not needs_ranking(config):
        return 0
    return {"off": 1, "stage": len(stages), "epoch": sum(stage.epochs for stage in stages)}[config.curriculum.rerank]


def _teacher_passes(
    config: TrainConfig, stages: Curriculum, teacher: ModelSize | None, amount: Workload, train: Split, *, cached: bool
) -> str:
    """How many examples the teacher's trunk reads, as ledger.json counts them."""
    if teacher is None:
        return "0"
    online = amount.samples
    if "teacher" in sources_of(config.curriculum.difficulty):
        online += len(train) * (_rankings(config, stages) - (config.curriculum.difficulty_file is not None))
    return f"{len(train):,} instead of {online:,}" if cached else f"{online:,}"


def _phases(
    config: TrainConfig,
    student: ModelSize,
    teacher: ModelSize | None,
    states: Mapping[str, int],
    activations: int,
    *,
    cached: bool,
    offloaded: bool,
    device_type: str,
) -> dict[str, dict[str, int]]:
    """Bytes per rank by phase and component; the largest phase decides whether the run fits."""
    whole = {"student's weights": student.parameters * student.itemsize}
    # An offloaded teacher has one layer on the device at a time; its head is the largest.
    read = (
        {} if teacher is None else {"teacher": (teacher.head if offloaded else teacher.parameters) * teacher.itemsize}
    )
    kept = read if teacher is None or not cached else {"teacher": teacher.head * teacher.itemsize}
    keys = answering_bytes(student, config.generation.eval_batch_size, config.data.max_length)
    answers = {"KV cache of answers": keys}
    phases = {}
    if teacher is not None:
        phases["caching" if cached else "loading"] = whole | read
    if needs_ranking(config):
        phases["ranking"] = whole | kept | answers
    chunk = objective_bytes(student, config.loss.chunk_tokens, device_type)
    objective = {"one chunk of logits, head's gradient": chunk}
    phases["training"] = dict(states) | kept | {"activations": activations} | objective
    if config.data.num_dev != 0:
        phases["dev evaluation"] = dict(states) | kept | answers
    return phases


def _work(
    config: TrainConfig,
    run: RunFolder,
    train: Split,
    stages: Curriculum,
    student: ModelSize,
    teacher: ModelSize | None,
    amount: Workload,
    *,
    cached: bool,
    to_cache: bool,
) -> dict[str, float]:
    """FLOPs of all ranks by part of the run."""
    once, columns = one_pass(train), columns_of(config.curriculum.difficulty)
    work: dict[str, float] = {}
    first_is_there = config.curriculum.difficulty_file is not None or run.ranking("difficulty").is_file()
    rankings = max(0, _rankings(config, stages) - first_is_there)
    # An answer is assumed to be as long as its reference: writing it costs as much as reading it once.
    of_student = sum(COLUMNS[column].source == "student" for column in columns)
    work["ranking"] = rankings * of_student * forward_work(student, once)
    if teacher is not None and "teacher" in sources_of(config.curriculum.difficulty):
        work["ranking"] += rankings * forward_work(teacher, once, trunk=not cached)
    if teacher is not None and cached and to_cache:
        work["caching the teacher's states"] = forward_work(teacher, once, head=False)
    work["student"] = training_work(student, amount, recomputes=config.models.gradient_checkpointing)
    if teacher is not None:
        work["teacher's head" if cached else "teacher"] = forward_work(teacher, amount, trunk=not cached)
    return {part: operations for part, operations in work.items() if operations}


def _show_amount(config: TrainConfig, amount: Workload, exact: bool, *, teacher_passes: str) -> None:
    about = "" if exact else "about "
    show_table(
        "what the run sees",
        ["", "count"],
        [
            ["optimiser steps", f"{amount.steps:,}"],
            ["examples", f"{amount.samples:,}"],
            ["tokens", f"{about}{amount.tokens:,}"],
            ["response tokens", f"{about}{amount.response_tokens:,}"],
            ["padding", f"{100 * (amount.padded_tokens / amount.tokens - 1):.0f} %"],
            ["examples read by the teacher", teacher_passes],
        ],
    )
    if not exact:
        say("The ranking is not known yet: tokens are counted for pools in the order of the data.")
    if config.curriculum.advance == "converged":
        say("Stages may end before their last epoch: these are upper bounds.")
    if config.on_policy.on_policy != "off":
        say("Tokens are those of the references; the student's own text may be longer or shorter.")


def _show_memory(costs: Costs, memory: int, micro_batch: tuple[int, int]) -> None:
    names = list(dict.fromkeys(name for phase in costs.phases.values() for name in phase))
    rows = [
        [name, *(f"{phase[name] / 1e9:.2f}" if name in phase else "" for phase in costs.phases.values())]
        for name in names
    ]
    rows.append(["sum", *(f"{sum(phase.values()) / 1e9:.2f}" for phase in costs.phases.values())])
    show_table(f"estimated memory per rank, of {memory / 1e9:.1f} GB [GB]", ["", *costs.phases], rows)
    say(
        f"Activations are those of the largest micro-batch, {micro_batch[0]} x {micro_batch[1]} tokens; Python, "
        f"its libraries and short-lived temporaries come on top."
    )
    if costs.found:
        say(f"The teacher's states are in {costs.found}, unless another teacher of this size made them.")
    elif costs.cache:
        say(f"The teacher's states take {costs.cache / 1e9:.2f} GB on disk.")


def _show_work(config: TrainConfig, costs: Costs, width: int, device: torch.device) -> None:
    num_ranks = distributed.world_size()
    distributed.barrier()  # ranks that share cores measure at the same time
    rate = distributed.broadcast(matmul_rate(width, DTYPES[config.models.dtype], device))
    rows = [[part, f"{work / 1e12:.4g}", _duration(work / rate / num_ranks)] for part, work in costs.work.items()]
    everything = sum(costs.work.values())
    rows.append(["sum", f"{everything / 1e12:.4g}", _duration(everything / rate / num_ranks)])
    show_table("work of all ranks", ["", "TFLOP", f"at {rate / 1e12:.3g} TFLOP/s per rank"], rows)
    sampling = ", sampling the student's text" if config.on_policy.on_policy != "off" else ""
    say(
        f"An estimate of matmuls alone, at the rate just measured on this machine for width {width}. Answers are "
        f"assumed to be as long as their references; softmaxes, norms, the optimiser, dev evaluation{sampling} and "
        f"waiting come on top."
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _check_fit(config: TrainConfig, costs: Costs, memory: int, zero_stage: int) -> None:
    """Raise UserError if a phase takes more memory than a rank has, or the cache more than the disk."""
    phase, parts = max(costs.phases.items(), key=lambda item: sum(item[1].values()))
    needed = sum(parts.values())
    if needed > memory:
        largest = max(parts, key=lambda name: parts[name])
        raise UserError(
            f"{phase} would take about {needed / 1e9:.1f} GB on a rank that has {memory / 1e9:.1f} GB, "
            f"{parts[largest] / 1e9:.1f} GB of it for {largest}; {_remedy(config, largest, zero_stage)}"
        )
    place = config.models.teacher_cache
    if costs.cache and place != "auto":
        folder = next(parent for parent in (Path(place), *Path(place).resolve().parents) if parent.exists())
        free = distributed.broadcast(shutil.disk_usage(folder).free)
        if costs.cache > free and not costs.found:
            raise UserError(
                f"the teacher cache would take {costs.cache / 1e9:.2f} GB, but {folder} has {free / 1e9:.2f} GB free; "
                f"give --teacher-cache another disk, or --teacher-cache off"
            )


def _remedy(config: TrainConfig, component: str, zero_stage: int) -> str:
    """How to make a component smaller."""
    lower_precision = ", or give --dtype bf16" if config.models.dtype == "fp32" else ""
    if component == "activations":
        checkpointing = "" if config.models.gradient_checkpointing else ", or give --gradient-checkpointing"
        return f"lower --max-tokens {config.optimiser.max_tokens}{checkpointing}{lower_precision}"
    if component.startswith("one chunk"):
        return f"lower --chunk-tokens {config.loss.chunk_tokens}"
    if component.startswith("KV cache"):
        return f"lower --eval-batch-size {config.generation.eval_batch_size}{lower_precision}"
    if component == "teacher":
        return f"give --teacher-offload on, or use a smaller teacher or a machine with more memory{lower_precision}"
    if component == "gradient buckets":
        return "lower reduce_bucket_size in the DeepSpeed configuration"
    more = "more ranks" if zero_stage == 3 else "--deepspeed-config scripts/deepspeed/zero3.json and more ranks"
    return f"shard it with {more}, or give --lora-rank 16{lower_precision}"
