"""The benchmark on a pair of a moment: what it writes, what it refuses, and that its count of work is right."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pocl.common import distributed
from pocl.common.files import ROOT
from pocl.losses import fused
from pocl.models.packing import never_packed
from pocl.models.states import response_states
from tests.runs import Result, call
from tools import benchmark
from tools.benchmarking import divergences, pairs, stepping
from tools.benchmarking.stepping import VARIANTS, Bench, Variant

FLAGS = ["--pair", "micro", "--batch", 6, "--batch-size", 2, "--rounds", 2, "--chunk-tokens", 16]
FLAGS += ["--max-length", 128, "--loss-tokens", 32, "--device", "cpu"]


def run(output_dir: Path, *extra: object) -> Result:
    return call(benchmark, [*FLAGS, "--no-memory", "--output-dir", output_dir, *extra])


def names_of(pair: str, device: str, dtype: str = "fp32") -> list[str]:
    return [variant.name for variant in stepping.variants_of(pair, torch.device(device), dtype)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    output_dir = tmp_path_factory.mktemp("benchmark")
    return output_dir, run(output_dir)


def test_the_variants_stand_in_their_order_with_equal_losses_and_gradients(measured: tuple[Path, Result]) -> None:
    output_dir, result = measured
    assert result.status == 0, result.output
    told = json.loads((output_dir / "benchmark.json").read_text())
    assert [record["name"] for record in told["steps"]] == names_of("micro", "cpu")
    assert all(record["name"] in result.output for record in told["steps"])
    for record in told["steps"]:
        assert record["losses"] == pytest.approx(told["steps"][0]["losses"], rel=1e-5)
        assert record["loss_error"] <= 1e-5 and record["gradient_error"] <= 1e-4
        assert len(record["seconds"]) == 2 and min(record["seconds"]) > 0
        assert record["samples_per_second"] == pytest.approx(6 / np.median(record["seconds"]))
        assert record["speedup"] == pytest.approx(
            record["samples_per_second"] / told["steps"][0]["samples_per_second"]
        )
        assert 0 < record["floor_share"] < 1
        shares = np.array(told["machine"]["floor_seconds"]) / record["seconds"]
        assert record["floor_share"] == pytest.approx(np.median(shares))
    assert told["settings"]["pair"] == "micro" and told["settings"]["dtype"] == "fp32"
    assert told["machine"]["flops_per_second"] > 1e9 and told["machine"]["bytes_per_second"] > 1e8


def test_a_pair_has_rows_for_what_differs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "onednn_is_better", lambda: True)
    monkeypatch.setattr(fused, "find_spec", lambda name: True)
    always = [*(variant.name for variant in VARIANTS), "the last, teacher online"]
    gelu, onednn, aligned, kernel = (
        variant.name for variant in (stepping.GELU, stepping.ONEDNN, stepping.ALIGNED, stepping.KERNEL)
    )
    for pair, device, dtype, more in (
        ("gpt2", "cpu", "fp32", [gelu, onednn]),
        ("opt", "cpu", "bf16", [onednn]),
        ("gpt2", "cuda", "bf16", [gelu, aligned, kernel]),
        ("opt", "cuda", "bf16", [kernel]),
        ("smollm2", "cuda", "bf16", [kernel]),
    ):
        assert names_of(pair, device, dtype) == [*always[:-1], *more, always[-1]], (pair, device)
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert kernel not in names_of("gpt2", "cuda", "bf16")


def test_a_gpu_packs_nothing_in_fp32() -> None:
    """Its flash attention takes no fp32."""
    variants = stepping.variants_of("gpt2", torch.device("cuda"), "fp32")
    assert [variant.name for variant in variants][-2:] == ["+ token budget", "the last, teacher online"]
    assert not any(variant.packed for variant in variants)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_benchmark_packs_is_what_the_trainer_packs(device: str, dtype: str) -> None:
    model = pairs.build_model(pairs.PAIRS["micro"]()[0], dtype=dtype, device=torch.device("cpu"))
    never = never_packed(model, torch.device(device))
    assert stepping.can_pack(torch.device(device), dtype) == (never is None)


def test_sizes_that_are_not_given_follow_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device_memory", lambda device: 80 * 10**9)
    given = benchmark.BenchmarkOptions(pair="gpt2")
    on_cpu, on_gpu = (benchmark.with_sizes(given, torch.device(name)) for name in ("cpu", "cuda"))
    assert (on_cpu.batch, on_cpu.batch_size, on_cpu.max_tokens, on_cpu.chunk_tokens) == (16, 4, 4 * 512, 128)
    assert (on_gpu.batch, on_gpu.batch_size, on_gpu.max_tokens, on_gpu.chunk_tokens) == (64, 8, 16_384, 4096)
    assert (on_cpu.dtype, on_gpu.dtype) == ("fp32", "bf16")
    said = dataclasses.replace(given, dtype="fp32", batch=6, batch_size=3, max_tokens=99, chunk_tokens=7)
    assert benchmark.with_sizes(said, torch.device("cuda")) == said


def test_every_variant_takes_a_whole_step_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = benchmark.BenchmarkOptions(pair="micro", batch=5, rounds=2, max_length=128, chunk_tokens=16)
    what = benchmark.with_sizes(given, torch.device("cpu"))
    bench = benchmark.make_bench(what, torch.device("cpu"), tmp_path)
    taken: list[tuple[str, bool, list[int]]] = []
    timing: list[bool] = []
    original = benchmark.forward_backward

    class Noting(benchmark.Stopwatch):
        def __enter__(self) -> "Noting":
            timing.append(True)
            return super().__enter__()  # type: ignore[return-value]

        def __exit__(self, *error: object) -> None:
            timing.pop()
            super().__exit__(*error)

    def noted(bench: Bench, variant: Variant, examples: np.ndarray) -> tuple[float, int]:
        taken.append((variant.name, bool(timing), examples.tolist()))
        return original(bench, variant, examples)

    monkeypatch.setattr(benchmark, "Stopwatch", Noting)
    monkeypatch.setattr(benchmark, "forward_backward", noted)
    benchmark.measure_steps(what, bench)
    names = names_of("micro", "cpu")
    rounds = [(False, [0, 1, 2, 3, 4]), (True, [0, 1, 2, 3, 4]), (True, [5, 6, 7, 8, 9])]
    assert taken == [(name, *of_round) for of_round in rounds for name in names]


def test_a_round_that_was_delayed_does_not_move_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = benchmark.BenchmarkOptions(pair="micro", batch=2, rounds=3, max_length=128, chunk_tokens=16)
    what = benchmark.with_sizes(given, torch.device("cpu"))
    bench = benchmark.make_bench(what, torch.device("cpu"), tmp_path)
    seconds = iter([0.5, 100.0, 0.25])

    def measure_round(what: object, bench: object, optimizer: object, examples: object, records: list[dict]) -> None:
        taken = next(seconds)
        for record in records:
            record["seconds"].append(taken)

    monkeypatch.setattr(benchmark, "measure_round", measure_round)
    records = benchmark.measure_steps(what, bench)
    assert {record["samples_per_second"] for record in records} == {2 / 0.5}


class Waits(TorchDispatchMode):
    """Counts what makes a program wait for a GPU: numbers that are read from it."""

    count = 0

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_a_step_waits_for_its_losses_once(tmp_path: Path) -> None:
    given = benchmark.BenchmarkOptions(pair="micro", batch=6, batch_size=2, rounds=1, max_length=128)
    what = benchmark.with_sizes(given, torch.device("cpu"))
    bench = benchmark.make_bench(what, torch.device("cpu"), tmp_path)

    def loss(bench: Bench, batch: stepping.Batch, variant: Variant) -> Tensor:
        return bench.student.get_output_embeddings().weight.sum() * 0 + len(batch.example_ids)

    variant = Variant("reads nothing", stepping.in_order, loss)
    with Waits() as waits:
        total, _ = benchmark.forward_backward(bench, variant, np.arange(6))
    assert waits.count == 1
    assert total == pytest.approx(6 / int(bench.split.num_labels.sum()))


def test_padding_falls_with_the_ideas(measured: tuple[Path, Result]) -> None:
    steps = json.loads((measured[0] / "benchmark.json").read_text())["steps"]
    ratios = [record["processed_ratio"] for record in steps]
    assert ratios[0] > ratios[1] > ratios[2] > 1
    assert ratios[2] == ratios[3] == ratios[4] == ratios[5]


def test_the_divergence_is_compared_with_float64(measured: tuple[Path, Result]) -> None:
    losses = json.loads((measured[0] / "benchmark.json").read_text())["losses"]
    assert [record["name"] for record in losses][:2] == ["plain autograd", "this project"]
    for record in losses:
        assert 0 < record["gradient_error"] < 1e-5
        assert record["loss"] == pytest.approx(losses[0]["loss"], rel=1e-5)


def test_the_picture_is_there(measured: tuple[Path, Result]) -> None:
    assert (measured[0] / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_bf16_variants_agree_within_its_rounding(tmp_path: Path) -> None:
    result = run(tmp_path, "--dtype", "bf16", "--rounds", 1, "--loss-tokens", 0)
    assert result.status == 0, result.output


@pytest.mark.parametrize(("factor", "error"), [(1.001, "1.0e-03"), (float("nan"), "nan")])
def test_a_variant_that_computes_something_else_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, error: str
) -> None:
    def wrong(bench: Bench, batch: stepping.Batch, variant: Variant) -> Tensor:
        return factor * VARIANTS[3].loss(bench, batch, variant)

    variants: Sequence[Variant] = [*VARIANTS[:3], dataclasses.replace(VARIANTS[3], loss=wrong), *VARIANTS[4:]]
    monkeypatch.setattr(stepping, "VARIANTS", variants)
    result = run(tmp_path)
    assert result.status == 1
    assert f"{VARIANTS[3].name!r} differs from the reference: loss error {error}" in result.last_line
    assert "samples/s" not in result.output
    assert not list(tmp_path.iterdir())


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where pocl is not installed
    given = benchmark.BenchmarkOptions(pair="micro", batch=2, rounds=1, device="cpu")
    what = benchmark.with_sizes(given, torch.device("cpu"))
    benchmark.make_bench(what, torch.device("cpu"), tmp_path)
    assert 0.001 < benchmark.memory_of(what, "+ cached teacher", tmp_path) < 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pair", "gpt3"], "unknown --pair 'gpt3'; did you mean 'gpt2'? (known: gpt2, opt"),
        (["--rounds", 0], "--rounds is 0; it must be above 0"),
        (["--loss-tokens", -1], "--loss-tokens is -1"),
        (["--batch", 100_000], "--batch times --rounds asks for 200000"),
        (["--memory-of", "magic"], "--memory-of 'magic' wants --work-dir and one of"),
    ],
    ids=str,
)
def test_mistakes_are_refused(tmp_path: Path, flags: list[object], words: str) -> None:
    result = run(tmp_path, *flags)
    assert result.status == 2
    assert words in result.last_line


@pytest.mark.parametrize("pair", ["small", "smollm2", "opt"])
def test_the_counted_work_is_what_torch_counts(pair: str) -> None:
    """For one example without padding, on shapes cut to two layers; attention, half of which is masked, left out."""
    shapes = pairs.PAIRS[pair]()
    for shape in shapes:
        shape.num_hidden_layers, shape.vocab_size = 2, 300
    device = torch.device("cpu")
    student, teacher = (
        pairs.build_model(shape, dtype="fp32", device=device, head_only=shape is shapes[1]) for shape in shapes
    )
    split = pairs.load_examples(None, 1, max_length=128, vocab_size=300)
    bench = Bench(student, teacher, None, split, 1, 1, 1, device)  # type: ignore[arg-type]
    batch, length = split.batch([0]), int(split.lengths[0])
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            head = teacher.get_output_embeddings()
            head(torch.zeros(int(split.num_labels[0]), head.in_features))
        student.get_output_embeddings()(response_states(student, batch)).sum().backward()
    products = ("aten.addmm", "aten.mm")  # no aten.bmm: older transformers multiply the angles of positions by it
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op).startswith(products))
    flops, _ = stepping.least_work(bench, np.array([0]))
    attention = 3 * 2 * 2 * student.config.hidden_size * length**2
    assert flops - attention == counted


def test_contenders_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences.importlib.util, "find_spec", lambda name: None)
    assert list(divergences.contenders()) == ["plain autograd", "this project"]
