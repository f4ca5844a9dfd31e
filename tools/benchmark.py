"""How fast a training step is, and how much memory it takes: this project's against the naive one, idea by idea.

    python tools/benchmark.py --pair small --data-dir processed_data/gpt2/dolly --output-dir results/benchmark

Random weights, real lengths. The variants take turns in one process on the same examples, each after a global batch
that is not timed, and the median of the rounds is told; each one's peak memory is measured in a process of its own. In
every round their losses and gradients are compared, and where they differ nothing is printed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pocl.cli import cpu
from pocl.cli.costs import micro_batch_tokens
from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common import distributed
from pocl.common.console import Progressing, say
from pocl.common.errors import RunStopped, UserError, closest
from pocl.data.dataset import Split
from pocl.losses.chunked import automatic_chunk_tokens
from pocl.models.teacher import CachedTeacher, cached_teacher
from pocl.training.log import STATUS, peak_memory_gb
from tools.benchmarking import divergences, printing, stepping
from tools.benchmarking.meters import Stopwatch, keep_freed_memory, measured_rates
from tools.benchmarking.stepping import PAIRS, Bench, Variant, build_model, forward_backward, least_work, variants_of

# Largest differences from the reference, as shares: of the loss, and of the whole gradient's norm.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 1e-1)}
DRAWN = "random weights"  # the teacher's fingerprint: every process draws the same


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured."""

    _argument_group_name: ClassVar[str] = "benchmark"
    output_dir: str = flag("folder for benchmark.json and benchmark.png", "results/benchmark")
    pair: str = flag(f"shapes of student and teacher: {', '.join(PAIRS)}", "small")
    data_dir: str | None = flag("processed folder whose lengths are taken [default: data/sample]", None)
    device: Literal["auto", "cpu", "cuda"] = flag("where; auto: the GPU where there is one", "auto")
    dtype: Literal["fp32", "bf16"] | None = flag("precision of both models [default: fp32, on a GPU bf16]", None)
    batch: int | None = flag("examples of one optimiser step [examples; default: 16, on a GPU 64]", None)
    rounds: int = flag("timed steps of each variant, each round on other examples [steps]", 3)
    batch_size: int | None = flag(
        "micro-batch of the variants without a token budget [examples; default: 4, on a GPU 8]", None
    )
    max_tokens: int | None = flag(
        "token budget of a micro-batch [tokens; default: what the reference's micro-batch holds, padding included; on "
        "a GPU train.py's]",
        None,
    )
    chunk_tokens: int | None = flag(
        "response tokens whose logits are held at a time [tokens; default: train.py's]", None
    )
    max_length: int = flag("prompt and response together; the reference pads to it [tokens]", 512)
    loss_tokens: int = flag("response tokens of the second table; 0 leaves it out [tokens]", 512)
    memory: bool = flag("measure peak memory, each variant in a process of its own", True)
    memory_of: str | None = flag("the program calls itself so: peak memory of this variant alone", None)
    work_dir: str | None = flag("with --memory-of: folder of the examples and the teacher's states", None)


def main() -> None:
    """Compare, time, measure memory, print, write."""
    quiet_libraries()
    (what,) = parse([BenchmarkOptions], "Measure the training step, idea by idea.")
    check(what)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if what.device == "auto" else what.device)
    what = with_sizes(what, device)
    if what.memory_of is not None:
        print_memory(what, device)
        return
    with tempfile.TemporaryDirectory(prefix="pocl-benchmark-") as folder:
        bench = make_bench(what, device, Path(folder))
        names = [variant.name for variant in variants_of(what.pair, device, what.dtype)]
        names += divergences.contenders() if what.loss_tokens else []
        # Before this process grows: on a small machine there is room for one of them.
        peaks = measure_memory(what, names, Path(folder)) if what.memory else {}
        steps = measure_steps(what, bench)
        cpu.use_fastest()  # for the floor, and for every side of the second table
        floor = hardware_floor(what, bench)
        losses = measure_losses(what, device) if what.loss_tokens else []
    for record in [*steps, *losses]:
        if peaks:
            record["peak_gb"] = peaks[record["name"]]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for record in steps:
        shares = [least / taken for least, taken in zip(floor["floor_seconds"], record["seconds"], strict=True)]
        record["floor_share"] = median(shares)
    settings = {key: value for key, value in asdict(what).items() if key not in ("memory_of", "work_dir")}
    machine = {"device": name, "torch": torch.__version__, **floor}
    printing.report({"settings": settings, "machine": machine, "steps": steps, "losses": losses})


def check(what: BenchmarkOptions) -> None:
    """Raise UserError for values that cannot be measured."""
    if what.pair not in PAIRS:
        raise UserError(f"unknown --pair {what.pair!r}{closest(what.pair, PAIRS)} (known: {', '.join(PAIRS)})")
    if what.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; use --device cpu")
    if what.memory and what.device != "cuda" and not STATUS.is_file():
        raise UserError(f"peak memory is read from {STATUS}, which this system has not; add --no-memory")
    for name in ("batch", "rounds", "batch_size", "max_tokens", "chunk_tokens"):
        value = getattr(what, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    if what.loss_tokens < 0:
        raise UserError(f"--loss-tokens is {what.loss_tokens}; it must be 0 (no second table) or above")


def with_sizes(what: BenchmarkOptions, device: torch.device) -> BenchmarkOptions:
    """The options with what the device decides where nothing was given."""
    on_gpu, memory = device.type == "cuda", distributed.device_memory(device)
    batch, batch_size, chunk_tokens, max_tokens = what.batch, what.batch_size, what.chunk_tokens, what.max_tokens
    dtype = what.dtype or ("bf16" if on_gpu else "fp32")  # packed examples want flash attention, which takes no fp32
    batch = batch or (64 if on_gpu else 16)
    batch_size = batch_size or (8 if on_gpu else 4)
    if chunk_tokens is None:
        vocab_size = max(shape.vocab_size for shape in PAIRS[what.pair]())
        chunk_tokens = automatic_chunk_tokens(vocab_size, memory, device.type)
    if max_tokens is None and on_gpu:
        with FakeTensorMode():
            student = build_model(PAIRS[what.pair]()[0], dtype=dtype, device=torch.device("cpu"))
            max_tokens = micro_batch_tokens(student, memory)
    sizes = {"dtype": dtype, "batch": batch, "batch_size": batch_size, "chunk_tokens": chunk_tokens}
    return replace(what, **sizes, max_tokens=max_tokens or batch_size * what.max_length)


def make_bench(what: BenchmarkOptions, device: torch.device, work_dir: Path, *, only: Variant | None = None) -> Bench:
    """Models, examples, teacher's states; the latter two are kept in ``work_dir``.

    ``only``: take them from there, and build no more of the models than this one variant needs.
    """
    shapes = PAIRS[what.pair]()
    options = {"dtype": what.dtype, "device": device}
    student = build_model(shapes[0], **options)
    teacher = build_model(shapes[1], head_only=only is not None and only.cached, **options).requires_grad_(False)
    if only is None:
        split = stepping.load_examples(
            Path(what.data_dir) if what.data_dir else None,
            what.batch * what.rounds,
            max_length=what.max_length,
            vocab_size=min(shape.vocab_size for shape in shapes),
        )
        split.table.save_to_disk(str(work_dir / "examples"))
        states = work_dir / "states"
        source = cached_teacher(teacher, split, states, device, key={"teacher": DRAWN}, vocab_size=None)
    else:
        split = Split(datasets.load_from_disk(str(work_dir / "examples")), what.max_length)
        source = CachedTeacher(work_dir / "states", split, teacher, device, fingerprint=DRAWN) if only.cached else None
    limits = {"batch_size": what.batch_size, "max_tokens": what.max_tokens, "chunk_tokens": what.chunk_tokens}
    return Bench(student, teacher, source, split, device=device, **limits)


def global_batch(what: BenchmarkOptions, number: int) -> np.ndarray:
    """Positions of the examples of one round.  -> [batch]."""
    return np.arange(number * what.batch, (number + 1) * what.batch)


def measure_steps(what: BenchmarkOptions, bench: Bench) -> list[dict[str, Any]]:
    """One record a variant: how far it is from the reference, what it processes, how long its steps take.

    The speed is that of the median round, which a round that something else delayed does not move; the rounds are the
    same global batches for every variant.  Raises RunStopped where a variant computes something else than the
    reference.
    """
    optimizer, variants = stepping.fresh_optimizer(bench.student), variants_of(what.pair, bench.device, what.dtype)
    records: list[dict[str, Any]] = [
        {"name": variant.name, "losses": [], "loss_error": 0.0, "gradient_error": 0.0, "processed": 0, "seconds": []}
        for variant in variants
    ]
    with Progressing("timing", what.rounds + 1) as progress:
        for variant in variants:
            warm_up(bench, variant, optimizer, global_batch(what, 0))
        progress.advance()
        for number in range(what.rounds):
            measure_round(what, bench, optimizer, global_batch(what, number), records)
            progress.advance()
    real = int(bench.split.lengths.sum())
    for record in records:
        record["processed_ratio"] = record.pop("processed") / real
        record["samples_per_second"] = what.batch / median(record["seconds"])
        record["speedup"] = record["samples_per_second"] / records[0]["samples_per_second"]
    return records


def warm_up(bench: Bench, variant: Variant, optimizer: torch.optim.Optimizer, examples: np.ndarray) -> None:
    """The gradient of one whole global batch [G], which is not timed; the optimiser has stepped when it was made.

    What is slow at first depends on shapes: memory from the driver, the choice of a product's kernel, compilation.
    """
    variant.set_up(bench)
    forward_backward(bench, variant, examples)
    optimizer.zero_grad()


def measure_round(
    what: BenchmarkOptions,
    bench: Bench,
    optimizer: torch.optim.Optimizer,
    examples: np.ndarray,
    records: Sequence[dict[str, Any]],
) -> None:
    """One step of each variant on the same global batch [G], added to the records; the comparison is not timed."""
    wanted = None
    variants = variants_of(what.pair, bench.device, what.dtype)
    for variant, record in zip(variants, records, strict=True):
        taken = Stopwatch(bench.device)
        variant.set_up(bench)
        with taken:
            loss, processed = forward_backward(bench, variant, examples)
        found = [parameter.grad for parameter in bench.student.parameters()]
        wanted = wanted or (loss, found)
        record["losses"].append(loss)
        errors = {"loss_error": abs(loss / wanted[0] - 1), "gradient_error": distance(found, wanted[1])}
        check_equal(variant.name, errors, what.dtype)
        record |= {key: max(record[key], error) for key, error in errors.items()}
        with taken:
            optimizer.step()
            optimizer.zero_grad()
        record["seconds"].append(taken.seconds)
        record["processed"] += processed


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The norm of the difference of two gradients as a share of the second one's."""
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    return (apart / sum(float(b.double().square().sum()) for b in wanted)) ** 0.5


def check_equal(name: str, errors: Mapping[str, float], dtype: str) -> None:
    """Raise RunStopped where a variant computes something else than the reference."""
    for (key, error), allowed in zip(errors.items(), TOLERANCE[dtype], strict=True):
        if not error <= allowed:  # also where it is not a number
            raise RunStopped(
                f"{name!r} differs from the reference: {key.replace('_', ' ')} {error:.1e}, "
                f"at most {allowed:.0e} is rounding; nothing is told of the speed"
            )


def hardware_floor(what: BenchmarkOptions, bench: Bench) -> dict[str, Any]:
    """The least time for each of the timed rounds, and this machine's measured rates that it is counted with."""
    flops_per_second, bytes_per_second = measured_rates(bench.student.dtype, bench.device)
    work = [least_work(bench, global_batch(what, number)) for number in range(what.rounds)]
    least = [part.flops / flops_per_second + part.bytes / bytes_per_second for part in work]
    return {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second, "floor_seconds": least}


def measure_losses(what: BenchmarkOptions, device: torch.device) -> list[dict[str, Any]]:
    """One record an implementation of the divergence: time, and the error of its gradients against float64."""
    rows = make_rows(what, device)
    true = divergences.true_gradients(rows)
    records = []
    for name, loss in divergences.contenders().items():
        value, found = divergences.gradients(rows, loss)
        error = divergences.largest_error(found, true)
        records.append({"name": name, "loss": value, "gradient_error": error, "seconds": []})
    for _ in range(what.rounds):
        for loss, record in zip(divergences.contenders().values(), records, strict=True):
            with Stopwatch(device) as taken:
                divergences.gradients(rows, loss)
            record["seconds"].append(taken.seconds)
    return records


def make_rows(what: BenchmarkOptions, device: torch.device, *, compiled: bool = True) -> divergences.Rows:
    """Heads of the pair and random states."""
    options = {"dtype": what.dtype, "device": device, "head_only": True}
    student, teacher = (build_model(shape, **options) for shape in PAIRS[what.pair]())
    limits = {"chunk_tokens": what.chunk_tokens, "compiled": compiled}
    return divergences.make_rows(student, teacher.requires_grad_(False), what.loss_tokens, **limits)


def measure_memory(what: BenchmarkOptions, names: Sequence[str], work_dir: Path) -> dict[str, float]:
    """The peak memory of each variant and each loss.  -> GB, by name."""
    peaks = {}
    with Progressing("measuring memory", len(names)) as progress:
        for name in names:
            peaks[name] = memory_of(what, name, work_dir)
            progress.advance(1, name)
    return peaks


def memory_of(what: BenchmarkOptions, name: str, work_dir: Path) -> float:
    """The peak memory of one variant, by this program in a new process.  -> GB."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(what).items() if value is not None]
    flags += [f"--memory-of={name}", f"--work-dir={work_dir}"]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        raise RunStopped(f"the memory of {name!r} could not be measured: {done.stderr.strip()[-300:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def print_memory(what: BenchmarkOptions, device: torch.device) -> None:
    """The most that one step needs beyond the bare program, models, gradients and AdamW included.  -> GB, as JSON."""
    variants = {variant.name: variant for variant in variants_of(what.pair, device, what.dtype)}
    losses = divergences.contenders()
    if what.memory_of not in (*variants, *losses) or not what.work_dir:
        raise UserError(f"--memory-of {what.memory_of!r} wants --work-dir and one of {[*variants, *losses]}")
    if what.memory_of in variants:
        before = peak_memory_gb(device)
        variant = variants[what.memory_of]
        bench = make_bench(what, device, Path(what.work_dir), only=variant)
        variant.set_up(bench)
        optimizer = stepping.fresh_optimizer(bench.student)
        forward_backward(bench, variant, global_batch(what, 0))
        optimizer.step()
    else:
        loss = losses[what.memory_of]
        cpu.use_fastest()
        # Another library's import would count as its memory: a small run first.
        divergences.gradients(make_rows(replace(what, pair="micro", loss_tokens=8), device, compiled=False), loss)
        before = peak_memory_gb(device)
        divergences.gradients(make_rows(what, device, compiled=False), loss)
    say(json.dumps(peak_memory_gb(device) - before))


if __name__ == "__main__":
    keep_freed_memory()
    run_main(main)
