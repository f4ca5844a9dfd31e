"""Products by oneDNN on the CPU: the same numbers as torch's own, gone when they are taken back."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocl.cli import cpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN here")

SHAPES = [(1, 1, 1), (1, 64, 300), (7, 33, 65), (130, 257, 70)]


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN's products, of small matrices, too."""
    monkeypatch.setattr(cpu, "_LEAST", 1)
    cpu.use_onednn()
    yield
    cpu.use_torchs_own()


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + columns)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-4)


def test_an_environment_variable_leaves_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.in_use() == "oneDNN"
    monkeypatch.setenv("POCL_ONEDNN", "0")
    assert not cpu.onednn_is_better()
    cpu.use_fastest()
    assert cpu.in_use() == "torch"


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64_however_their_factors_lie_in_memory(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    left, right = matrix(rows, inner), matrix(inner, columns)
    wanted = left.double() @ right.double()
    for a in (left, left.t().contiguous().t(), torch.cat([left, left], 1)[:, :inner]):
        for b in (right, right.t().contiguous().t(), torch.cat([right, right], 1)[:, :columns]):
            close(a @ b, wanted)
    close(left[:, :1].expand(rows, inner) @ right, left[:, :1].double().expand(rows, inner) @ right.double())
    close(left @ right[:, :1].expand(inner, columns), left.double() @ right[:, :1].double().expand(inner, columns))


@pytest.mark.parametrize("bias", [(), (5,), (1,), (4, 1), (4, 5)])
def test_a_bias_of_any_shape_and_factor_is_added(bias: tuple[int, ...]) -> None:
    left, right, added = matrix(4, 3), matrix(3, 5), torch.full(bias, 0.7)
    product = left.double() @ right.double()
    close(torch.addmm(added, left, right), added.double() + product)
    close(torch.addmm(added, left, right, beta=0.5, alpha=2.0), 0.5 * added.double() + 2 * product)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_added_in_place(shape: tuple[int, int, int], transposed: bool) -> None:
    rows, inner, columns = shape
    left, right = matrix(rows, inner), matrix(inner, columns)
    left = left.t().contiguous().t() if transposed else left
    total, wide = matrix(rows, columns + 1)[:, 1:], torch.ones(rows, columns)
    wanted = total.double() + left.double() @ right.double()
    assert total.addmm_(left, right) is total
    close(total, wanted)
    close(wide.addmm_(left, right, beta=0.5, alpha=2.0), 0.5 + 2 * left.double() @ right.double())
    close(torch.full((rows, columns), torch.nan).addmm_(left, right, beta=0), left.double() @ right.double())
    with pytest.raises(RuntimeError):
        torch.ones(columns).addmm_(left, right)  # a sum that would have to spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_numbers_are_multiplied_as_torch_does(dtype: torch.dtype) -> None:
    left, right = (10 * matrix(6, 8)).to(dtype), (10 * matrix(8, 5)).to(dtype)
    found = left @ right, torch.addmm(torch.ones(5).to(dtype), left, right)
    added = torch.ones(6, 5).to(dtype).addmm_(left, right)
    cpu.use_torchs_own()
    assert torch.equal(found[0], left @ right)
    assert torch.equal(found[1], torch.addmm(torch.ones(5).to(dtype), left, right))
    assert torch.equal(added, torch.ones(6, 5).to(dtype).addmm_(left, right))


def test_empty_factors_give_zeros_and_wrong_shapes_torchs_own_error() -> None:
    assert torch.equal(torch.zeros(2, 0) @ torch.zeros(0, 3), torch.zeros(2, 3))
    assert (torch.zeros(0, 4) @ torch.zeros(4, 3)).shape == (0, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.zeros(2, 4) @ torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.zeros(2, 4) @ torch.zeros(4, 2, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradients_of_a_layer_are_those_of_float64(bias: bool) -> None:
    layer, inputs = nn.Linear(33, 70, bias=bias), matrix(24, 33).view(4, 6, 33).requires_grad_()
    layer(inputs).square().sum().backward()
    found = [inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    wide, wide_inputs = nn.Linear(33, 70, bias=bias).double(), inputs.detach().double().requires_grad_()
    wide.load_state_dict(layer.state_dict())
    wide(wide_inputs).square().sum().backward()
    for gradient, wanted in zip(found, [wide_inputs.grad, *(p.grad for p in wide.parameters())], strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 100, 10_000])
@pytest.mark.parametrize("tokens", [7, 64, 65])
def test_a_transposed_factor_is_copied_some_rows_at_a_time(
    block: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_BLOCK", block)
    left, right, bias = matrix(tokens, 31), matrix(tokens, 2), matrix(1, 2)[0]
    wanted = left.t().double() @ right.double()
    close(left.t() @ right, wanted)
    close(torch.addmm(bias, left.t(), right), wanted + bias.double())


MANY_SHAPES = """
import torch
from pocl.cli import cpu
cpu._LEAST = 1
cpu.use_onednn()
def used():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 1_000_000
inputs, weight = torch.randn(800, 512), torch.randn(512, 64)
for tokens in range(100, 800):
    inputs[:tokens] @ weight
    before = used() if tokens == 109 else 0 if tokens < 109 else before
print(used() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from Linux's /proc")
def test_products_of_many_shapes_do_not_fill_the_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # MB; with the caches as they come 700 shapes took 400


def test_small_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true = cpu._multiply
    monkeypatch.setattr(
        cpu, "_multiply", lambda left, *more, **named: calls.append(left.shape) or true(left, *more, **named)
    )
    monkeypatch.setattr(cpu, "_LEAST", 9 * 8 * 7)
    for rows in (8, 9):
        added = matrix(rows, 7)
        added.addmm_(matrix(rows, 8), matrix(8, 7))
        torch.addmm(matrix(1, 7)[0], matrix(rows, 8), matrix(8, 7))
        matrix(rows, 8) @ matrix(8, 7)
    assert calls == [(9, 8)] * 3  # rows * inner * columns multiplications


def test_a_right_factor_that_onednn_has_no_fast_kernel_for_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_multiply", lambda *_: pytest.fail("a cut-out of a matrix went to oneDNN"))
    left, whole = matrix(5, 8), matrix(9, 20)
    for right in (whole[:8, 3:9], whole[1:7, :8].t()):
        close(left[:, : len(right)] @ right, left[:, : len(right)].double() @ right.double())


def test_taken_back_torch_multiplies_with_its_own_kernel_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    true = cpu._multiply
    monkeypatch.setattr(cpu, "_multiply", lambda *given: calls.append(1) or true(*given))
    cpu.use_onednn()  # a second time is the same as once
    matrix(4, 4) @ matrix(4, 4)
    cpu.use_torchs_own()
    matrix(4, 4) @ matrix(4, 4)
    assert len(calls) == 1
    cpu.use_onednn()
    matrix(4, 4) @ matrix(4, 4)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("vendor", "machine", "wanted"),
    [("AuthenticAMD", "x86_64", True), ("GenuineIntel", "x86_64", False), ("", "aarch64", False)],
)
def test_it_is_for_processors_on_which_mkl_does_not_do_its_best(
    vendor: str, machine: str, wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 26\n")
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu.onednn_is_better() is wanted
