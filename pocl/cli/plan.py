"""``train.py --plan``: print what a run would take, and refuse one that does not fit this machine.

``make_plan`` and ``why_not`` are pure; what they need is found on models without weights (``look``).
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from pocl.cli.build import deepspeed_config_path, prepare_student
from pocl.cli.costs import (
    ModelSize,
    activation_bytes,
    answering_bytes,
    model_size,
    objective_bytes,
    state_bytes,
)
from pocl.cli.options import LoraOptions, TrainConfig
from pocl.cli.resolve import (
    cache_place,
    finished_cache,
    make_schedule,
    needs_ranking,
    offloads_teacher,
    show_schedule,
    wants_packing,
)
from pocl.cli.workload import Shape, Workload, count_workload
from pocl.common import distributed
from pocl.common.console import say, show_table
from pocl.common.errors import UserError
from pocl.curriculum.schedule import Schedule
from pocl.curriculum.stages import Curriculum
from pocl.data.dataset import Split
from pocl.data.micro_batches import OVERHEAD_TOKENS, MicroBatchLimits
from pocl.difficulty.ranking import sources_of
from pocl.difficulty.ranking_file import read_ranking
from pocl.models.loading import load_skeleton
from pocl.models.lora import add_adapters
from pocl.models.packing import never_packed
from pocl.models.teacher_cache import cache_bytes
from pocl.training.deepspeed_config import read_deepspeed_config
from pocl.training.run_folder import RunFolder


@dataclass(frozen=True)
class StatesOnDisk:
    """The teacher's hidden states."""

    size: int  # bytes
    found: Path | None = None  # where they are already
    folder: Path | None = None  # where they were asked to be, or its closest parent that exists; None: beside the data
    free: int = 0  # bytes that its disk has left


@dataclass(frozen=True)
class Machine:
    """What a rank runs on."""

    device_type: str
    memory: int  # bytes
    zero: Mapping[str, Any]  # DeepSpeed's zero_optimization
    num_ranks: int = 1


@dataclass(frozen=True)
class Findings:
    """What a plan is made from, beside the options."""

    num_examples: int
    stages: Curriculum
    workload: Workload
    student: ModelSize  # as it is trained
    teacher: ModelSize | None
    offloaded: bool  # whether the teacher's layers go to the device one by one
    states: StatesOnDisk | None  # None: the teacher is online, or there is none
    activations: int  # bytes that the trunk keeps of the micro-batch that takes most
    micro_batch: Shape  # this one


@dataclass(frozen=True)
class Plan:
    """What a run would take."""

    phases: Mapping[str, Mapping[str, int]]  # bytes per rank, by phase and component; the largest phase decides
    online_passes: int  # examples that the trunk of an online teacher would read
    teacher_passes: int  # examples that the teacher's trunk reads, as ledger.json counts them


def show_plan(config: TrainConfig, run: RunFolder, train: Split, device: torch.device) -> None:
    """Print what the run would take: stages, steps, tokens, memory, disk.  Raises UserError if it does not fit."""
    schedule, exact = _ranked(config, run, make_schedule(config, len(train)), train)
    show_schedule(schedule, config.loss.type)
    zero = read_deepspeed_config(deepspeed_config_path(config)).get("zero_optimization", {})
    machine = Machine(device.type, distributed.device_memory(device), zero, distributed.world_size())
    found = look(config, schedule, train, device)
    plan = make_plan(config, found, machine)
    _show_workload(config, found.workload, plan, exact=exact)
    _show_memory(plan, machine, found.micro_batch)
    _show_disk(found.states)
    why = why_not(config, plan, found.states, machine)
    if why:
        raise UserError(why)


def _ranked(config: TrainConfig, run: RunFolder, schedule: Schedule, train: Split) -> tuple[Schedule, bool]:
    """(the schedule under the ranking that is known, whether it is the one that the run will have)."""
    given = config.curriculum
    path = Path(given.difficulty_file) if given.difficulty_file else run.path / "difficulty.jsonl"
    known = given.difficulty_file is not None or path.is_file()
    exact = (known and given.rerank == "off") or schedule.scheme.order != "ranked"
    return schedule.rank(read_ranking(path, train).order) if known else schedule, exact


def look(config: TrainConfig, schedule: Schedule, train: Split, device: torch.device) -> Findings:
    """What the plan of a run is made from.

    Activations are those of training all weights also where adapters are trained: they are about the same.
    """
    models, fake = config.models, FakeTensorMode()
    with fake:
        student = load_skeleton(models.model, models.dtype)
        prepare_student(replace(config, lora=LoraOptions()), student)
        teacher = load_skeleton(models.teacher, models.dtype) if models.teacher else None
    packed = wants_packing(config) and not any(never_packed(model, device) for model in (student, teacher) if model)
    limits = MicroBatchLimits(
        config.sizes.max_tokens, config.optimiser.batch_size, OVERHEAD_TOKENS[device.type], packed
    )
    workload = count_workload(schedule, train, limits, num_ranks=distributed.world_size())
    with fake:
        activations, micro_batch = max(
            (activation_bytes(student, *shape, device_type=device.type), shape) for shape in workload.largest
        )
        size, of_teacher = model_size(student), model_size(teacher) if teacher else None
    if config.lora.lora_rank:
        with torch.device("meta"):  # peft moves what it adds, which a fake tensor does not bear
            adapted = load_skeleton(models.model, models.dtype)
            add_adapters(adapted, models.model, seed=config.optimiser.seed, **asdict(config.lora))
        size = model_size(adapted)
    offloaded = of_teacher is not None and offloads_teacher(config, size.weights, of_teacher.weights, device)
    states = _states_on_disk(config, train, teacher) if teacher else None
    return Findings(
        num_examples=len(train),
        stages=schedule.stages,
        workload=workload,
        student=size,
        teacher=of_teacher,
        offloaded=offloaded,
        states=states,
        activations=activations,
        micro_batch=micro_batch,
    )


def _states_on_disk(config: TrainConfig, train: Split, teacher: PreTrainedModel) -> StatesOnDisk | None:
    """The teacher's cache; None if it is online."""
    found, size = finished_cache(config, train, teacher), cache_bytes(train, teacher)
    place = cache_place(config, train, teacher, made=found is not None)
    if place == "off":
        return None
    if place == "auto":
        return StatesOnDisk(size, found)
    folder = next(parent for parent in (Path(place), *Path(place).resolve().parents) if parent.exists())
    return StatesOnDisk(size, found, folder, distributed.broadcast(shutil.disk_usage(folder).free))


def make_plan(config: TrainConfig, found: Findings, machine: Machine) -> Plan:
    """What a run takes."""
    online = 0
    if found.teacher is not None:
        online = found.workload.samples
        if "teacher" in sources_of(config.curriculum.difficulty):
            first_is_given = config.curriculum.difficulty_file is not None
            online += found.num_examples * (_num_rankings(config, found.stages) - first_is_given)
    return Plan(_phases(config, found, machine), online, found.num_examples if found.states else online)


def _num_rankings(config: TrainConfig, stages: Curriculum) -> int:
    """How many times the run ranks its examples, including the first."""
    if not needs_ranking(config):
        return 0
    if config.curriculum.rerank == "epoch":
        return sum(stage.epochs for stage in stages)
    return len(stages) if config.curriculum.rerank == "stage" else 1


def _phases(config: TrainConfig, found: Findings, machine: Machine) -> dict[str, dict[str, int]]:
    """Bytes per rank by phase and component."""
    student, teacher, sizes = found.student, found.teacher, config.sizes
    on_gpu = machine.device_type == "cuda"
    states = state_bytes(student, machine.zero, num_ranks=machine.num_ranks, on_gpu=on_gpu)
    answers = {"KV cache of answers": answering_bytes(student, sizes.eval_batch_size, config.data.max_length)}
    whole, read, kept = {"student's weights": student.weights}, {}, {}
    phases = {}
    if teacher is not None:
        head = teacher.head * teacher.itemsize
        # An offloaded teacher has one layer on the device at a time; its head is the largest. Cached states need no
        # more of it.
        read = {"teacher": head if found.offloaded else teacher.weights}
        kept = {"teacher": head} if found.states else read
        phases["caching" if found.states else "loading"] = whole | read
    if needs_ranking(config):
        phases["ranking"] = whole | kept | answers
    phases["training"] = (
        states
        | kept
        | {"activations": found.activations}
        | {"one chunk of logits, head's gradient": objective_bytes(student, sizes.chunk_tokens, machine.device_type)}
    )
    if config.data.num_dev != 0:
        phases["dev evaluation"] = states | kept | answers
    return phases


def why_not(config: TrainConfig, plan: Plan, states: StatesOnDisk | None, machine: Machine) -> str | None:
    """Why a run does not fit, and what would make it; None if it does."""
    phase, parts = max(plan.phases.items(), key=lambda item: sum(item[1].values()))
    needed = sum(parts.values())
    if needed > machine.memory:
        largest = max(parts, key=lambda name: parts[name])
        return (
            f"{phase} would take about {needed / 1e9:.1f} GB on a rank that has {machine.memory / 1e9:.1f} GB, "
            f"{parts[largest] / 1e9:.1f} GB of it for {largest}; {_remedy(config, largest, machine)}"
        )
    if states and states.folder and not states.found and states.size > states.free:
        return (
            f"the teacher cache would take {states.size / 1e9:.2f} GB, but {states.folder} has "
            f"{states.free / 1e9:.2f} GB free; give --teacher-cache another disk, or --teacher-cache off"
        )
    return None


def _remedy(config: TrainConfig, component: str, machine: Machine) -> str:
    """How to make a component smaller."""
    lower_precision = ", or give --dtype bf16" if config.models.dtype == "fp32" else ""
    if component == "activations":
        checkpointing = "" if config.models.gradient_checkpointing else ", or give --gradient-checkpointing"
        return f"lower --max-tokens {config.sizes.max_tokens}{checkpointing}{lower_precision}"
    if component.startswith("one chunk"):
        return f"lower --chunk-tokens {config.sizes.chunk_tokens}"
    if component.startswith("KV cache"):
        return f"lower --eval-batch-size {config.sizes.eval_batch_size}{lower_precision}"
    if component == "teacher":
        return f"give --teacher-offload on, or use a smaller teacher or a machine with more memory{lower_precision}"
    if component == "gradient buckets":
        return "lower reduce_bucket_size in the DeepSpeed configuration"
    sharded = machine.zero.get("stage", 0) == 3
    more = "more ranks" if sharded else "--deepspeed-config scripts/deepspeed/zero3.json and more ranks"
    return f"shard it with {more}, or give --lora-rank 16{lower_precision}"


def _show_workload(config: TrainConfig, workload: Workload, plan: Plan, *, exact: bool) -> None:
    about = "" if exact else "about "
    saved = f" instead of {plan.online_passes:,}" if plan.teacher_passes != plan.online_passes else ""
    show_table(
        "what the run sees",
        ["", "count"],
        [
            ["optimiser steps", f"{workload.steps:,}"],
            ["examples", f"{workload.samples:,}"],
            ["tokens", f"{about}{workload.tokens:,}"],
            ["response tokens", f"{about}{workload.response_tokens:,}"],
            ["padding", f"{100 * (workload.padded_tokens / workload.tokens - 1):.0f} %"],
            ["examples read by the teacher", f"{plan.teacher_passes:,}{saved}"],
        ],
    )
    if not exact:
        say("The ranking is not known yet: tokens are counted for pools in the order of the data.")
    if config.curriculum.advance == "converged":
        say("Stages may end before their last epoch: these are upper bounds.")
    if config.on_policy.on_policy != "off":
        say("Tokens are those of the references; the student's own text may be longer or shorter.")


def _show_memory(plan: Plan, machine: Machine, micro_batch: Shape) -> None:
    phases = plan.phases
    names = list(dict.fromkeys(name for phase in phases.values() for name in phase))
    rows = [
        [name, *(f"{phase[name] / 1e9:.2f}" if name in phase else "" for phase in phases.values())] for name in names
    ]
    rows.append(["sum", *(f"{sum(phase.values()) / 1e9:.2f}" for phase in phases.values())])
    show_table(f"estimated memory per rank, of {machine.memory / 1e9:.1f} GB [GB]", ["", *phases], rows)
    say(
        f"Activations are those of the largest micro-batch, {micro_batch[0]} x {micro_batch[1]} tokens; Python, "
        f"its libraries and short-lived temporaries come on top."
    )


def _show_disk(states: StatesOnDisk | None) -> None:
    if states and states.found:
        say(f"The teacher's states are in {states.found}, unless another teacher of this size made them.")
    elif states:
        say(f"The teacher's states take {states.size / 1e9:.2f} GB on disk.")
