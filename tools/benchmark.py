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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pocl.cli import cpu
from pocl.cli.costs import micro_batch_tokens
from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common import distributed
from pocl.common.console import Progressing, say
from pocl.common.errors import RunStopped, UserError
from pocl.data.dataset import Split
from pocl.losses.chunked import automatic_chunk_tokens
from pocl.models.teacher_cache import StatesCache, open_cache
from pocl.training.log import STATUS, peak_memory_gb
from tools.benchmarking import divergences, printing, stepping
from tools.benchmarking.meters import Stopwatch, keep_freed_memory, measured_rates
from tools.benchmarking.pairs import PAIRS, build_model, load_examples
from tools.benchmarking.stepping import Bench, Variant, forward_backward, least_work, variants_of


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured."""

    _argument_group_name: ClassVar[str] = "benchmark"
    output_dir: str = flag("folder for benchmark.json and benchmark.png", "results/benchmark")
    pair: str = flag(f"shapes of student and teacher: {', '.join(PAIRS)}", "small", known=PAIRS)
    data_dir: str | None = flag("processed folder whose lengths are taken [default: data/sample]", None)
    device: Literal["auto", "cpu", "cuda"] = flag("where; auto: the GPU where there is one", "auto")
    dtype: Literal["fp32", "bf16"] | None = flag("precision of both models [default: fp32, on a GPU bf16]", None)
    batch: int | None = flag("examples of one optimiser step [examples; default: 16, on a GPU 64]", None, above=0)
    rounds: int = flag("timed steps of each variant, each round on other examples [steps]", 3, above=0)
    batch_size: int | None = flag(
        "micro-batch of the variants without a token budget [examples; default: 4, on a GPU 8]", None, above=0
    )
    max_tokens: int | None = flag(
        "token budget of a micro-batch [tokens; default: what the reference's micro-batch holds, padding included; on "
        "a GPU train.py's]",
        None,
        above=0,
    )
    chunk_tokens: int | None = flag(
        "response tokens whose logits are held at a time [tokens; default: train.py's]", None, above=0
    )
    max_length: int = flag("prompt and response together; the reference pads to it [tokens]", 512)
    loss_tokens: int = flag("response tokens of the second table; 0 leaves it out [tokens]", 512, at_least=0)
    memory: bool = flag("measure peak memory, each variant in a process of its own", True)
    memory_of: str | None = flag("the program calls itself so: peak memory of this variant alone", None)
    work_dir: str | None = flag("with --memory-of: folder of the examples and the teacher's states", None)

    def check(self) -> None:
        """Raise UserError for what cannot be measured here."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no GPU here; use --device cpu")
        if self.memory and self.device != "cuda" and not STATUS.is_file():
            raise UserError(f"peak memory is read from {STATUS}, which this system has not; add --no-memory")


def main() -> None:
    """Compare, time, measure memory, print, write."""
    quiet_libraries()
    (what,) = parse([BenchmarkOptions], "Measure the training step, idea by idea.")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if what.device == "auto" else what.device)
    what = with_sizes(what, device)
    if what.memory_of is not None:
        print_memory(what, device)
        return
    with tempfile.TemporaryDirectory(prefix="pocl-benchmark-") as folder:
        bench = make_bench(what, device, Path(folder))
        # Before this process grows: on a small machine there is room for one of them.
        peaks = measure_memory(what, device, Path(folder)) if what.memory else {}
        steps = measure_steps(what, bench)
        cpu.use_fastest()  # for the floor, and for every side of the second table
        floor = hardware_floor(what, bench)
        losses = divergences.compare(make_rows(what, device), what.rounds) if what.loss_tokens else []
    for record in steps:
        shares = [least / taken for least, taken in zip(floor["floor_seconds"], record["seconds"], strict=True)]
        record["floor_share"] = median(shares)
    for record in [*steps, *losses] if peaks else []:
        record["peak_gb"] = peaks[record["name"]]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    settings = {key: value for key, value in asdict(what).items() if key not in ("memory_of", "work_dir")}
    machine = {"device": name, "torch": torch.__version__, **floor}
    printing.report({"settings": settings, "machine": machine, "steps": steps, "losses": losses})


def with_sizes(what: BenchmarkOptions, device: torch.device) -> BenchmarkOptions:
    """The options with what the device decides where nothing was given."""
    on_gpu, memory, shapes = device.type == "cuda", distributed.device_memory(device), PAIRS[what.pair]()
    # On a GPU bf16: packed examples want flash attention, which takes no fp32.
    dtype, batch, batch_size = ("bf16", 64, 8) if on_gpu else ("fp32", 16, 4)
    what = replace(
        what,
        dtype=what.dtype or dtype,
        batch=what.batch or batch,
        batch_size=what.batch_size or batch_size,
        chunk_tokens=what.chunk_tokens
        or automatic_chunk_tokens(max(shape.vocab_size for shape in shapes), memory, device.type),
    )
    if what.max_tokens is not None or not on_gpu:
        return replace(what, max_tokens=what.max_tokens or what.batch_size * what.max_length)
    with FakeTensorMode():
        student = build_model(shapes[0], dtype=what.dtype, device=torch.device("cpu"))
        return replace(what, max_tokens=micro_batch_tokens(student, memory))


def make_bench(what: BenchmarkOptions, device: torch.device, work_dir: Path, *, only: Variant | None = None) -> Bench:
    """Models, examples, teacher's states; the latter two are kept in ``work_dir``.

    ``only``: take them from there, and build no more of the models than this one variant needs.
    """
    shapes = PAIRS[what.pair]()
    options = {"dtype": what.dtype, "device": device}
    student = build_model(shapes[0], **options)
    teacher = build_model(shapes[1], head_only=only is not None and only.cached, **options).requires_grad_(False)
    if only is None:
        split = load_examples(
            Path(what.data_dir) if what.data_dir else None,
            what.batch * what.rounds,
            max_length=what.max_length,
            vocab_size=min(shape.vocab_size for shape in shapes),
        )
        split.table.save_to_disk(str(work_dir / "examples"))
        key = {"teacher": "random weights"}  # every process draws the same
        cache = open_cache(teacher, split, work_dir / "states", device, key=key)
    else:
        split = Split(datasets.load_from_disk(str(work_dir / "examples")), what.max_length)
        cache = StatesCache(work_dir / "states", split, teacher) if only.cached else None
    limits = {"batch_size": what.batch_size, "max_tokens": what.max_tokens, "chunk_tokens": what.chunk_tokens}
    return Bench(student, teacher, cache, split, device=device, **limits)


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
        errors = {"loss_error": abs(loss / wanted[0] - 1), "gradient_error": stepping.distance(found, wanted[1])}
        stepping.check_equal(variant.name, errors, what.dtype)
        record |= {key: max(record[key], error) for key, error in errors.items()}
        with taken:
            optimizer.step()
            optimizer.zero_grad()
        record["seconds"].append(taken.seconds)
        record["processed"] += processed


def hardware_floor(what: BenchmarkOptions, bench: Bench) -> dict[str, Any]:
    """The least time for each of the timed rounds, and this machine's measured rates that it is counted with."""
    flops_per_second, bytes_per_second = measured_rates(bench.student.dtype, bench.device)
    work = [least_work(bench, global_batch(what, number)) for number in range(what.rounds)]
    least = [flops / flops_per_second + moved / bytes_per_second for flops, moved in work]
    return {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second, "floor_seconds": least}


def make_rows(what: BenchmarkOptions, device: torch.device, *, compiled: bool = True) -> divergences.Rows:
    """What the implementations of the divergence are compared on."""
    limits = {"chunk_tokens": what.chunk_tokens, "compiled": compiled}
    return divergences.make_rows(what.pair, what.loss_tokens, dtype=what.dtype, device=device, **limits)


def measure_memory(what: BenchmarkOptions, device: torch.device, work_dir: Path) -> dict[str, float]:
    """The peak memory of each variant and each loss.  -> GB, by name."""
    names = [variant.name for variant in variants_of(what.pair, device, what.dtype)]
    names += divergences.contenders() if what.loss_tokens else []
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
