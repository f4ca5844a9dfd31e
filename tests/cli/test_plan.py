"""--plan: tokens as the ledger counts them, memory against hand counts and real tensors, refusals."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import train
from pocl.cli.checks import parse_train
from pocl.cli.costs import (
    ModelSize,
    _saved_bytes,
    activation_bytes,
    answering_bytes,
    cached_numbers,
    micro_batch_tokens,
    model_size,
    objective_bytes,
    prompts_at_once,
    state_bytes,
)
from pocl.cli.plan import Findings, Machine, Plan, StatesOnDisk, look, make_plan, why_not
from pocl.cli.resolve import make_schedule, offloads_teacher, prompts_together, with_sizes
from pocl.cli.workload import Workload, count_workload, total
from pocl.common import distributed
from pocl.common.errors import UserError
from pocl.curriculum.schedule import Schedule
from pocl.curriculum.stages import Stage
from pocl.data.dataset import load_split
from pocl.data.micro_batches import MicroBatchLimits
from pocl.models.loading import load_model, load_skeleton
from pocl.models.lora import add_adapters
from pocl.models.states import trunk
from pocl.models.tuning import recompute_activations
from tests.models.tiny_families import tiny_family
from tests.ranks import on_ranks
from tests.runs import MAX_LENGTH, Folders, Result, call, make_folders, train_arguments, train_until_stage
from tests.tiny import FAMILIES, save_model, tiny_model, tiny_tokenizer


class Lengths:
    """What the planner reads of a split: three examples of 5, 3 and 4 inputs and 2, 1 and 3 labels."""

    lengths = np.array([5, 3, 4])
    num_labels = np.array([2, 1, 3])

    def __len__(self) -> int:
        return 3


ONE_MICRO_BATCH = MicroBatchLimits(max_tokens=10**6, batch_size=None, overhead=10**6)


def schedule_of(num_examples: int, epochs: int) -> Schedule:
    """One stage over the first examples of ``Lengths``, in batches of two."""
    return Schedule((Stage(0, range(num_examples), epochs, 1.0, 1.0),), np.arange(3), global_batch_size=2)


def test_a_stage_counts_every_epoch_and_drops_its_short_batch() -> None:
    schedule = schedule_of(3, epochs=2)
    found = count_workload(schedule, Lengths(), ONE_MICRO_BATCH, num_ranks=1)
    assert (found.steps, found.samples) == (2, 4)
    read = [i for update in schedule for i in update.examples]
    assert len(read) == 4
    assert found.tokens == sum(Lengths.lengths[i] for i in read)
    assert found.response_tokens == sum(Lengths.num_labels[i] for i in read)
    longest = max(Lengths.lengths[i] for i in read[:2])
    assert found.padded_tokens == 2 * 2 * longest  # the first epoch's, twice
    assert found.largest == ((2, longest),)


def test_ranks_and_stages_add_up() -> None:
    share = count_workload(schedule_of(2, epochs=1), Lengths(), ONE_MICRO_BATCH, num_ranks=2)
    assert (share.tokens, share.padded_tokens, share.largest) == (8, 2 * 5, ((1, 5),))
    both = total([share, Workload(1, 3, 12, 1, 12.0, ((3, 4),))])
    assert (both.steps, both.samples, both.tokens, both.padded_tokens) == (2, 5, 8 + 12, 10 + 12)
    assert both.largest == ((3, 4),)
    few = Workload(1, 3, 6, 1, 6.0, ((3, 2),))
    assert total([share, few]).largest == ((3, 2), (1, 5))  # most tokens, most pairs


def test_the_numbers_of_a_gpt2_are_those_counted_by_hand() -> None:
    numbers = model_size(tiny_model("gpt2", vocab_size=600, end_id=0))  # 2 layers, 4 heads, H = 32
    assert numbers == ModelSize(
        parameters=600 * 32 + 1024 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32,
        trained=600 * 32 + 1024 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32,
        itemsize=4,
        head=600 * 32,
        trained_head=True,
        vocab_size=600,
        cached_numbers=2 * 2 * 32,
    )
    assert answering_bytes(numbers, 3, 10) == 3 * 10 * 128 * 4
    assert objective_bytes(numbers, 16, "cpu") == (2 + 15) * 4 * 16 * 600 + 8 * 600 * 32
    assert objective_bytes(numbers, 4096, "cpu") == 4 * (2 * 4096 * 600 + 15 * 2**19) + 8 * 600 * 32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_has_the_numbers_of_the_real_model_and_no_weights(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_model(tiny_model(family, vocab_size=len(tokenizer), end_id=0), tokenizer, tmp_path)
    real = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with FakeTensorMode():
        skeleton = load_skeleton(str(tmp_path), "bf16")
        assert model_size(skeleton) == model_size(real)
    assert model_size(real).parameters == real.num_parameters()


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", ["q_proj"]), ("gpt2", ["all-linear"]), ("opt", ["fc1", "fc2"])]
)
def test_adapters_are_counted_as_they_are_when_put_in(family: str, targets: list[str], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_model(tiny_model(family, vocab_size=len(tokenizer), end_id=0), tokenizer, tmp_path)
    with torch.device("meta"):
        skeleton = load_skeleton(str(tmp_path))
        add_adapters(skeleton, "base", lora_rank=2, lora_alpha=None, lora_dropout=0.0, lora_targets=targets, seed=0)
        planned = model_size(skeleton)
    real = AutoModelForCausalLM.from_pretrained(tmp_path)
    add_adapters(real, "base", lora_rank=2, lora_alpha=None, lora_dropout=0.0, lora_targets=targets, seed=0)
    counted = model_size(real)
    assert planned == counted
    if family == "llama":
        assert planned.trained == 2 * 2 * (32 + 32)  # two layers; rank 2 down from H = 32 and up to it


def test_a_run_with_adapters_is_planned(folders: Folders, tmp_path: Path) -> None:
    result = call(train, train_arguments(folders, tmp_path, "--lora-rank", 2, "--plan"))
    assert result.status == 0, result.output
    assert "optimiser steps" in result.output and list(tmp_path.iterdir()) == []
    result = call(train, train_arguments(folders, tmp_path, "--lora-rank", 2, "--lora-targets", "q_prj", "--plan"))
    assert result.status == 2 and "names no linear layer" in result.last_line


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gemma3", "llama4", "mamba2", "lfm2"])
@pytest.mark.parametrize("extra", [[], ["--lora-rank", 2]], ids=["", "lora"])
def test_a_run_of_a_mixture_a_hybrid_or_a_text_part_is_planned(
    family: str, extra: list[object], folders: Folders, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_family(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    place = save_model(model, tokenizer, tmp_path / "model")
    arguments = train_arguments(folders, tmp_path / "run", "--model", place, "--teacher", place, "--plan", *extra)
    result = call(train, arguments)
    assert result.status == 0, result.output
    assert "optimiser steps" in result.output


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_experts_activations_are_counted_as_they_are_saved(family: str, tmp_path: Path) -> None:
    """Against a real pass, whose products with the experts are torch's own."""
    model = tiny_family(family)
    model.save_pretrained(tmp_path)
    with FakeTensorMode():
        planned = activation_bytes(load_skeleton(str(tmp_path)), 2, 16)
    real = _saved_bytes(model.train(), 2, 16)
    assert abs(planned - real) < 0.1 * real


@pytest.mark.parametrize(
    ("stage", "dtype", "num_ranks", "wanted"),
    [  # bytes a parameter: weights, gradients, optimiser, gathered, bucket; counted behind DeepSpeed 0.19 on the CPU
        (0, "fp32", 2, (4, 4, 8, 0, 0)),
        (1, "fp32", 1, (4, 4, 12, 0, 4)),
        (1, "fp32", 2, (4, 4, 6, 0, 4)),
        (1, "bf16", 2, (2, 2, 6, 0, 2)),
        (2, "fp32", 2, (4, 2, 6, 0, 4)),
        (2, "bf16", 2, (2, 1, 6, 0, 2)),
        (3, "fp32", 2, (2, 2, 6, 4, 4)),
        (3, "bf16", 2, (1, 1, 6, 2, 2)),
    ],
)
def test_states_of_training_are_those_that_deepspeed_keeps(
    stage: int, dtype: str, num_ranks: int, wanted: Sequence[int]
) -> None:
    model = tiny_model("gpt2", vocab_size=600, end_id=0).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    numbers = model_size(model)
    found = state_bytes(numbers, {"stage": stage}, num_ranks=num_ranks, on_gpu=False)
    names = ("student's weights", "gradients", "optimiser", "gathered weights", "gradient buckets")
    assert [found.get(name, 0) for name in names] == [size * numbers.parameters for size in wanted]


def test_buckets_of_a_gpu_are_whole_and_offloaded_states_are_elsewhere() -> None:
    numbers = model_size(tiny_model("gpt2", vocab_size=600, end_id=0))
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1e7}
    found = state_bytes(numbers, zero, num_ranks=2, on_gpu=True)
    assert (found["gradient buckets"], found["optimiser"]) == (4 * 10**7, 0)
    assert state_bytes(numbers, {"stage": 1}, num_ranks=2, on_gpu=True)["gradient buckets"] == 4 * 500_000_000


def kept_bytes(model: PreTrainedModel, rows: int, length: int) -> int:
    """The bytes that autograd really keeps of a micro-batch, but for the weights."""
    own, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = trunk(model)(input_ids=torch.ones(rows, length, dtype=torch.long), use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_model(tiny_model(family, vocab_size=len(tokenizer), end_id=0), tokenizer, tmp_path)
    model = load_model(str(tmp_path)).train()
    whole = kept_bytes(model, 4, 40)
    recompute_activations(model)
    few = kept_bytes(model, 4, 40)
    with FakeTensorMode():
        skeleton = load_skeleton(str(tmp_path))
        # A mask of 40 x 40 is made where a real model needs none: much here, little where layers are wide.
        assert whole <= activation_bytes(skeleton, 4, 40) <= 1.15 * whole
        recompute_activations(skeleton)
        assert few + whole / 2 <= activation_bytes(skeleton, 4, 40) <= 1.15 * (few + whole / 2)


def test_attention_with_dropout_keeps_squares_of_the_tokens_on_a_cpu_and_none_without() -> None:
    for dropout, squares in ((0.0, 0), (0.1, 3)):
        states = [torch.randn(2, 4, 64, 16, requires_grad=True) for _ in range(3)]
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, dropout_p=dropout)
        assert [*kept.values()].count(4 * 2 * 4 * 64 * 64) == squares


def save_with_dropout(family: str, folder: Path, *, attention: float) -> Path:
    """A tiny model folder with a dropout of 0.1 of hidden states, where the family has one, and this of attention."""
    model = tiny_model(family, vocab_size=600, end_id=0)
    hidden = {"gpt2": ("resid_pdrop", "embd_pdrop"), "opt": ("dropout",)}.get(family, ())
    for name in hidden:
        setattr(model.config, name, 0.1)
    setattr(model.config, "attn_pdrop" if family == "gpt2" else "attention_dropout", attention)
    return save_model(model, tiny_tokenizer(), folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_dropout_takes_memory_on_a_cpu_and_none_on_a_gpu(family: str, tmp_path: Path) -> None:
    dropping, keeping = (save_with_dropout(family, tmp_path / str(p), attention=p) for p in (0.1, 0.0))
    on_cpu, without = (kept_bytes(load_model(str(path)).train(), 4, 40) for path in (dropping, keeping))
    squares = 2 * 3 * 4 * (4 * 4 * 40**2)  # layers, matrices of each, bytes of a number
    assert on_cpu == pytest.approx(without + squares, rel=0.03)
    with FakeTensorMode():
        skeleton = load_skeleton(str(dropping))
        assert on_cpu <= activation_bytes(skeleton, 4, 40) <= 1.15 * on_cpu
        assert without <= activation_bytes(skeleton, 4, 40, device_type="cuda") <= 1.15 * without


def test_attention_dropout_halves_no_micro_batch_of_a_gpu(tmp_path: Path) -> None:
    paths = [save_with_dropout("gpt2", tmp_path / str(p), attention=p) for p in (0.1, 0.0)]
    with FakeTensorMode():
        dropping, keeping = (load_skeleton(str(path)) for path in paths)
        states = 18 * sum(parameter.numel() for parameter in keeping.parameters())
        room = 4096 * activation_bytes(keeping, 1, 512) // 512
        assert micro_batch_tokens(keeping, 2 * (states + room)) == 4096
        assert micro_batch_tokens(dropping, 2 * (states + room)) == 4096


def planned(result: Result, row: str) -> str:
    """A value of the plan's tables."""
    assert result.status == 0, result.output
    return re.search(rf"│ {row} +│ +(.*?) +│", result.output)[1]


RUNS = {
    "sft": ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", "--epochs", 3],
    "kd": ["--type", "fkl", "--num-stages", 1, "--curriculum", "whole-pool", "--epochs", 2, "--global-batch-size", 10],
    "online": ["--type", "rkl", "--num-stages", 2, "--curriculum", "random", "--teacher-cache", "off"],
    "pocl": ["--type", "tfkl", "--global-batch-size", 5],
    "ranked by an online teacher": ["--type", "tfkl", "--difficulty", "teacher", "--rerank", "stage"]
    + ["--num-stages", 2, "--epochs", 1, "--teacher-cache", "off"],
}


@dataclass(frozen=True)
class Planned:
    """A run that was planned before and after it was made."""

    arguments: list[str]
    folder: Path
    before: Result
    after: Result


def plan_and_train(name: str, folders: Folders, place: Path) -> Planned:
    arguments = train_arguments(folders, place / "out", *RUNS[name], "--num-dev", 0, teacher=name != "sft")
    before = after = call(train, [*arguments, "--plan"])
    assert before.status == 0 and not (place / "out").exists(), before.output
    assert call(train, arguments).status == 0
    if name.endswith(("pocl", "teacher")):
        after = call(train, [*arguments, "--plan"])
    (folder,) = (place / "out").glob("*/seed10")
    return Planned(arguments, folder, before, after)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folders, Planned]:
    """A POCL run with data of its own, beside which its teacher's states lie."""
    folders = make_folders(tmp_path_factory.mktemp("cached"), "gpt2")
    return folders, plan_and_train("pocl", folders, tmp_path_factory.mktemp("pocl"))


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_what_the_ledger_says_afterwards(
    name: str, folders: Folders, cached: tuple[Folders, Planned], tmp_path: Path
) -> None:
    run = cached[1] if name == "pocl" else plan_and_train(name, folders, tmp_path)
    if run.before is not run.after:  # no ranking yet: pools of the right size, with other examples
        assert planned(run.before, "tokens").startswith("about ")
    ledger = json.loads((run.folder / "ledger.json").read_text())
    counts = {"optimiser steps": "optimizer_steps", "examples": "samples", "tokens": "tokens"}
    for row, key in (counts | {"response tokens": "response_tokens"}).items():
        shown = planned(run.after, row)
        if "online teacher" in name:  # it ranks again, which no plan knows; its last pool is everything
            shown = shown.removeprefix("about ")
        assert shown == f"{ledger[key]:,}"
    passes = planned(run.after, "examples read by the teacher").split(" instead of ")
    assert passes[0] == f"{ledger['teacher_forward_passes']:,}"
    assert passes[1:] == ([f"{ledger['samples']:,}"] if name in ("kd", "pocl") else [])
    assert "plan" not in json.loads((run.folder / "config.json").read_text())["options"]["run"]


def test_a_cache_that_is_there_is_found(cached: tuple[Folders, Planned], tmp_path: Path) -> None:
    folders, run = cached
    assert re.search(r"The teacher's states take \d\.\d\d GB on disk", run.before.output), run.before.output
    (cache,) = (folders.data / "teacher-cache").iterdir()
    assert f"states are in {cache}" in run.after.output.replace("\n", "")
    elsewhere = call(train, [*run.arguments, "--plan", "--run-name", "other", "--teacher-cache", tmp_path / "other"])
    assert "GB on disk" in elsewhere.output


def options(*flags: str) -> Any:
    """Options of a run of tfkl whose sizes are decided."""
    sizes = ["--chunk-tokens", "8", "--max-tokens", "64", "--eval-batch-size", "2", "--max-length", "32"]
    return parse_train(["--model", "s", "--teacher", "t", "--data-dir", "d", "--output-dir", "o", *sizes, *flags])


SIZE = ModelSize(
    parameters=1000, trained=800, itemsize=4, head=100, trained_head=True, vocab_size=50, cached_numbers=8
)
TEACHER = replace(SIZE, parameters=5000, trained=0, head=300)
STAGES = (Stage(0, range(25), 2, 1.0, 0.7), Stage(1, range(50), 2, 2.0, 1.0))
FOUND = Findings(50, STAGES, Workload(6, 150, 1500, 700, 1600.0, ((2, 9),)), SIZE, TEACHER, False, None, 77, (2, 9))
CPU = Machine("cpu", 10**9, {"stage": 1})


def test_each_phase_holds_what_it_needs() -> None:
    plan = make_plan(options(), FOUND, CPU)
    keys, chunk = 2 * 32 * 8 * 4, objective_bytes(SIZE, 8, "cpu")
    states = state_bytes(SIZE, CPU.zero, num_ranks=1, on_gpu=False)
    head = {"one chunk of logits, head's gradient": chunk}
    assert plan.phases == {
        "loading": {"student's weights": 4000, "teacher": 20_000},
        "ranking": {"student's weights": 4000, "teacher": 20_000, "KV cache of answers": keys},
        "training": states | {"teacher": 20_000, "activations": 77} | head,
        "dev evaluation": states | {"teacher": 20_000, "KV cache of answers": keys},
    }
    cached = make_plan(options("--num-dev", "0"), replace(FOUND, states=StatesOnDisk(9)), CPU).phases
    assert list(cached) == ["caching", "ranking", "training"]
    assert (cached["caching"]["teacher"], cached["training"]["teacher"]) == (20_000, 4 * 300)
    alone = make_plan(options("--curriculum", "whole-pool"), replace(FOUND, teacher=None), CPU)
    assert list(alone.phases) == ["training", "dev evaluation"] and alone.teacher_passes == 0
    assert "teacher" not in alone.phases["training"]


def test_an_offloaded_teacher_is_counted_by_its_head() -> None:
    plan = make_plan(options(), replace(FOUND, offloaded=True), CPU)
    assert {phase["teacher"] for phase in plan.phases.values()} == {4 * 300}


@pytest.mark.parametrize(
    ("flags", "rankings"),
    [("--rerank off", 1), ("--rerank stage", 2), ("--rerank epoch", 4), ("--rerank stage --difficulty-file d", 1)]
    + [("--curriculum random", 0), ("--difficulty length", 0)],
)
def test_a_teacher_that_ranks_reads_all_examples_each_time(flags: str, rankings: int) -> None:
    config = options("--difficulty", "teacher", *flags.split())
    assert make_plan(config, FOUND, CPU).teacher_passes == 150 + 50 * rankings
    cached = make_plan(config, replace(FOUND, states=StatesOnDisk(9)), CPU)
    assert (cached.teacher_passes, cached.online_passes) == (50, 150 + 50 * rankings)


@pytest.mark.parametrize(
    ("flags", "component", "zero_stage", "remedy"),
    [
        ("", "activations", 1, "lower --max-tokens 64, or give --gradient-checkpointing, or give --dtype bf16"),
        ("--gradient-checkpointing --dtype bf16", "activations", 1, "lower --max-tokens 64"),
        ("", "one chunk of logits, head's gradient", 1, "lower --chunk-tokens 8"),
        ("", "KV cache of answers", 1, "lower --eval-batch-size 2, or give --dtype bf16"),
        ("", "teacher", 1, "give --teacher-offload on, or use a smaller teacher"),
        ("", "gradient buckets", 1, "lower reduce_bucket_size"),
        ("", "optimiser", 1, "zero3.json and more ranks, or give --lora-rank 16"),
        ("", "optimiser", 3, "shard it with more ranks, or give --lora-rank 16"),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_mends_it(
    flags: str, component: str, zero_stage: int, remedy: str
) -> None:
    plan = Plan({"ranking": {component: 1}, "training": {"gathered weights": 1, component: 10**9}}, 0, 0)
    machine = replace(CPU, memory=10**8, zero={"stage": zero_stage})
    told = why_not(options(*flags.split()), plan, None, machine)
    assert told is not None and remedy in told
    assert told.startswith("training would take about 1.0 GB on a rank that has 0.1 GB, 1.0 GB of it for " + component)
    assert why_not(options(), plan, None, replace(machine, memory=10**9 + 1)) is None


@pytest.mark.parametrize(
    ("extra", "part", "remedy"),
    [
        (["--max-tokens", 100_000], "activations", "lower --max-tokens 100000, or give --gradient-checkpointing"),
        (
            ["--batch-size", 1, "--chunk-tokens", 1, "--gradient-checkpointing"],
            "optimiser",
            "zero3.json and more ranks, or give --lora-rank 16",
        ),
    ],
    ids=["activations", "states"],
)
def test_a_run_that_does_not_fit_is_refused(
    extra: list[object], part: str, remedy: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device_memory", lambda device: 10**6)
    sizes = ["--type", "sft", "--curriculum", "whole-pool", "--num-stages", 1, "--num-dev", 0]
    sizes += ["--global-batch-size", 48, "--batch-size", 48]
    result = call(train, train_arguments(folders, tmp_path, *sizes, *extra, "--plan", teacher=False))
    assert result.status == 2
    assert "on a rank that has 0.0 GB" in result.last_line
    assert f"for {part}" in result.last_line and remedy in result.last_line


@pytest.mark.parametrize(
    ("given", "device", "memory", "offloaded"),
    [
        ("auto", "cuda", 1000, False),
        ("auto", "cuda", 999, True),  # 80 % of it is less than 800
        ("auto", "cpu", 1, False),
        ("off", "cuda", 1, False),
        ("on", "cpu", 1000, True),
    ],
)
def test_a_teacher_that_does_not_fit_is_offloaded(
    given: str, device: str, memory: int, offloaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_train(["--model", "s", "--teacher", "t", "--data-dir", "d", "--output-dir", "o"])
    config = replace(config, models=replace(config.models, teacher_offload=given))
    monkeypatch.setattr(distributed, "device_memory", lambda device: memory)
    assert offloads_teacher(config, 300, 500, torch.device(device)) is offloaded


def test_prompts_fill_a_quarter_of_memory_and_no_more() -> None:
    a_prompt = 100 * 10 * 2  # tokens, numbers of one, bytes of one
    for device, most in (("cpu", 64), ("cuda", 1024)):
        room = {count: 4 * count * a_prompt for count in (1, 8, most)}
        assert [prompts_at_once(10, 2, 100, memory, device) for memory in room.values()] == list(room)
        assert prompts_at_once(10, 2, 100, room[8] - 1, device) == 4
        assert prompts_at_once(10, 2, 100, 10**12, device) == most
        assert prompts_at_once(10, 2, 100, 1, device) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_of_a_token_are_as_many_as_an_answer_caches(
    family: str, models: dict[str, PreTrainedModel]
) -> None:
    cache = models[family](torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert 3 * cached_numbers(models[family].config) == kept


MEMORIES = (10**7, 3 * 10**7, 10**8, 10**9, 10**12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_micro_batch_of_a_gpu_is_halved_until_it_has_room(folders: Folders, checkpointing: bool) -> None:
    with FakeTensorMode():
        student = load_skeleton(str(folders.student), "bf16")
        if checkpointing:
            recompute_activations(student)
        states = 2 * 18 * sum(parameter.numel() for parameter in student.parameters())
        sizes = [micro_batch_tokens(student, states + memory) for memory in (0, *MEMORIES)]
        for size, memory in zip(sizes[1:], MEMORIES, strict=True):
            assert size == 1024 or activation_bytes(student, size // 512, 512, device_type="cuda") <= memory / 2
    assert sizes == sorted(sizes) and sizes[0] == 1024 and sizes[-1] == 16_384 and len(set(sizes)) > 2


def test_sizes_that_are_not_given_follow_from_model_and_machine(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--model", str(folders.student), "--type", "sft", "--data-dir", "d", "--output-dir", "o"]
    monkeypatch.setattr(distributed, "device_memory", lambda device: 10**9)

    def sizes(device: str, *flags: str, begun: dict[str, Any] | None = None) -> tuple[int | None, ...]:
        config = with_sizes(parse_train([*command, *flags]), 600, torch.device(device), begun=begun)
        return config.loss.chunk_tokens, config.optimiser.max_tokens, config.generation.eval_batch_size

    assert sizes("cpu") == (128, 4096, 64)
    assert sizes("cuda", "--max-length", "512") == (1024, 16_384, 512)
    assert prompts_together(str(folders.student), "bf16", 512, torch.device("cuda")) == 1024
    assert sizes("cuda", "--max-tokens", "77", "--eval-batch-size", "3", "--chunk-tokens", "5") == (5, 77, 3)
    begun = {"loss": {"chunk_tokens": 8}, "optimiser": {"max_tokens": 9}, "generation": {}}
    assert sizes("cpu", begun=begun) == (8, 9, 64)
    assert sizes("cuda", "--max-tokens", "77", "--max-length", "512", begun=begun) == (8, 77, 512)
    with pytest.raises(UserError, match="not a folder"):
        prompts_together("./nowhere", "fp32", 512, torch.device("cpu"))


def test_a_run_goes_on_where_memory_is_another(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sizes that it was begun with."""
    command = train_arguments(folders, tmp_path, "--type", "sft", "--num-dev", 0, teacher=False)
    train_until_stage(command, 2)
    config = json.loads((tmp_path / "sft" / "seed10" / "config.json").read_text())["options"]
    monkeypatch.setattr(distributed, "device_memory", lambda device: 10**7)
    parsed = parse_train(command)
    assert with_sizes(parsed, 600, torch.device("cpu")).loss.chunk_tokens != config["loss"]["chunk_tokens"]
    result = call(train, command)
    assert result.status == 0 and "resuming from step" in result.output, result.output
    assert json.loads((tmp_path / "sft" / "seed10" / "config.json").read_text())["options"] == config
    result = call(train, [*command, "--chunk-tokens", "7"])
    assert result.status == 2 and "chunk_tokens was" in result.last_line


def test_what_is_found_of_a_teacher(folders: Folders) -> None:
    numbers = model_size(load_model(str(folders.teacher)))
    split = load_split(folders.data, "train", max_length=MAX_LENGTH)
    command = train_arguments(folders, folders.data, "--teacher-cache", "off", "--chunk-tokens", 8, "--max-tokens", 64)
    for given in ("off", "on"):
        config = parse_train([*command, "--eval-batch-size", "2", "--teacher-offload", given])
        found = look(config, make_schedule(config, len(split)), split, torch.device("cpu"))
        assert (found.offloaded, found.states) == (given == "on", None)
        assert found.teacher is not None
        assert (found.teacher.weights, found.teacher.head) == (4 * numbers.parameters, numbers.head)


def test_a_cache_that_the_disk_does_not_hold_is_refused(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    place = ["--teacher-cache", tmp_path / "far" / "cache", "--plan"]
    result = call(train, train_arguments(folders, tmp_path / "out", *place))
    assert result.status == 2 and "the teacher cache would take" in result.last_line
    assert f"{tmp_path} has 0.00 GB free" in result.last_line
    assert not (tmp_path / "far").exists()


def test_several_ranks_plan_once(folders: Folders, tmp_path: Path) -> None:
    arguments = train_arguments(folders, tmp_path / "out", "--type", "tfkl", "--plan")
    result = on_ranks("train.py", arguments, num_ranks=2)
    assert result.status == 0, result.output
    assert result.output.count("what the run sees") == 1
    assert not (tmp_path / "out").exists()


def test_a_plan_of_packed_batches_has_no_padding(folders: Folders) -> None:
    split = load_split(folders.data, "train", max_length=MAX_LENGTH)
    stage = Stage(0, range(len(split)), 3, 1.0, 1.0)
    schedule = Schedule((stage,), np.arange(len(split)), global_batch_size=20)
    padded, packed = (
        count_workload(schedule, split, replace(ONE_MICRO_BATCH, packed=packed), num_ranks=1)
        for packed in (False, True)
    )
    assert packed.padded_tokens == packed.tokens == padded.tokens < padded.padded_tokens
