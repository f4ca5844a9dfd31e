"""The kernel of the token objective: on a GPU as it is, else in Triton's interpreter (conftest.py), and compiled."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from pocl.common.files import read_jsonl
from pocl.data.batch import collate
from pocl.losses import divergences as losses
from pocl.losses import fused
from pocl.losses.divergences import LOSSES
from pocl.losses.fused import fused_objective, never_fused, why_not_fused
from pocl.losses.head import HEAD_ROWS, HiddenStates, aligned
from pocl.losses.token import StageObjective, Weights, token_objective
from pocl.models.states import make_head, response_states
from tests.parts import module_of
from tests.runs import call, make_folders, train_arguments
from tests.tiny import tiny_model

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = [name for name in LOSSES if not name.startswith("t") or name == "tvd"]
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def smaller_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_BLOCK", 64)  # so that rows of these sizes take several


def rows(vocab_size: int, dtype: torch.dtype = torch.float32, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher that are near each other, and labels."""
    generator = torch.Generator().manual_seed(vocab_size)
    student = 3.0 * torch.randn(count, vocab_size, generator=generator)
    teacher = student + torch.randn(count, vocab_size, generator=generator)
    labels = torch.randint(vocab_size, (count,), generator=generator)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), labels.to(DEVICE)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance as a share of what was wanted."""
    return float(torch.norm(found.double() - wanted.double()) / torch.norm(wanted.double()).clamp(min=1e-30))


def compare(
    objective: StageObjective, student: Tensor, teacher: Tensor | None, labels: Tensor, weights: Weights | None = None
) -> None:
    """Values and gradient of the kernel are those of torch's operations in float64."""
    in_float64 = None if teacher is None else teacher.double()
    doubled = None if weights is None else Weights(weights.divergence.double(), weights.cross_entropy.double())
    *wanted, gradient = token_objective(student.double(), in_float64, labels, objective, doubled)
    found = student.clone() if student.is_contiguous() else student
    values = fused_objective(found, teacher, labels, objective, weights)
    for a, b in zip(values, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-6)  # nats: as near as torch's are in float32
    assert apart(found, gradient) <= DTYPES[student.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", KINDS)
def test_every_divergence_is_what_torch_makes_of_it(name: str, temperature: float, dtype: torch.dtype) -> None:
    objective = StageObjective(LOSSES[name].bind(), temperature, temperature**2, 0.6)
    compare(objective, *rows(150, dtype))


@pytest.mark.parametrize("name", KINDS)
def test_each_token_can_have_its_own_weights(name: str) -> None:
    ratio = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], device=DEVICE)
    cross_entropy = torch.tensor([1.0, 0.75, 0.0, 0.1, 0.0], device=DEVICE)
    compare(StageObjective(LOSSES[name].bind(), 1.3, 1.3, 1.0), *rows(200, count=5), Weights(ratio, cross_entropy))


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 128, 1000])
def test_any_vocabulary_size(vocab_size: int) -> None:
    compare(StageObjective(LOSSES["tjsd"].bind(), 1.5, 2.25, 0.7), *rows(vocab_size))


@pytest.mark.parametrize("vocab_size", [1, 65, 320])
def test_cross_entropy_alone(vocab_size: int) -> None:
    student, _, labels = rows(vocab_size)
    compare(StageObjective(), student, None, labels)


def test_cross_entropy_is_left_out_at_a_ratio_of_one() -> None:
    objective = StageObjective(LOSSES["fkl"].bind(), kd_ratio=1.0)
    student, teacher, labels = rows(100, count=5)
    compare(objective, student, teacher, labels)
    student[torch.arange(5, device=DEVICE), labels] = -float("inf")  # an infinite cross-entropy
    loss, _, divergence = fused_objective(student, teacher, labels, objective)
    assert loss.equal(divergence) and student.isfinite().all()


@pytest.mark.parametrize("parameter", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("name", ["jsd", "sfkl", "srkl"])
def test_the_divergences_own_parameter_arrives(name: str, parameter: float) -> None:
    compare(StageObjective(LOSSES[name].bind(skew=parameter, teacher_weight=parameter), 1.0, 1.0, 0.8), *rows(150))


@pytest.mark.parametrize("name", KINDS)
def test_entries_that_a_model_masks_give_no_nan(name: str) -> None:
    student, teacher, labels = rows(150)
    labels = labels.clamp(max=39)
    student[:, 40:90], teacher[:, 60:120] = -float("inf"), -float("inf")
    objective = StageObjective(LOSSES[name].bind(), 1.2, 1.44, 0.6)
    *wanted, gradient = token_objective(student.double(), teacher.double(), labels, objective)
    values = fused_objective(student, teacher, labels, objective)
    for a, b in zip((*values, student), (*wanted, gradient), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", KINDS)
def test_large_logits_far_apart(name: str) -> None:
    student, teacher, labels = rows(150, count=5)
    compare(StageObjective(LOSSES[name].bind(), 1.0, 1.0, 0.6), 40.0 * student, -40.0 * teacher, labels)


@pytest.mark.parametrize("broken", ["student", "teacher"])
def test_a_nan_among_the_logits_arrives_in_values_and_gradient(broken: str) -> None:
    student, teacher, labels = rows(150, count=5)
    (student if broken == "student" else teacher)[2, 77] = float("nan")
    loss, _, divergence = fused_objective(
        student, teacher, labels, StageObjective(LOSSES["fkl"].bind(), 1.0, 1.0, 0.6)
    )
    assert loss.isnan().tolist() == divergence.isnan().tolist() == [False, False, True, False, False]
    assert student.isnan().any(1).tolist() == [False, False, True, False, False]


def test_logits_may_be_the_front_of_wider_rows_whose_end_is_then_zero() -> None:
    objective = StageObjective(LOSSES["trkl"].bind(), 1.5, 2.25, 0.6)
    student, teacher, labels = rows(150, count=5)
    wide, wide_teacher = (torch.full((5, width), 9.0, device=DEVICE) for width in (192, 176))
    wide[:, :150], wide_teacher[:, :150] = student, teacher
    compare(objective, wide[:, :150], wide_teacher[:, :150], labels)
    assert (wide[:, 150:160] == 0).all() and (wide[:, 160:] == 9).all() and (wide_teacher[:, 150:] == 9).all()


def test_the_last_row_is_not_left_where_there_is_no_room_behind_it() -> None:
    student, teacher, labels = rows(150, count=5)
    memory = torch.full((4 * 160 + 155,), 9.0, device=DEVICE)
    cut_short = memory.as_strided((5, 150), (160, 1))
    cut_short.copy_(student)
    wide = torch.zeros(5, 160, device=DEVICE)
    wide[:, :150] = teacher
    compare(StageObjective(LOSSES["fkl"].bind(), 1.0, 1.0, 0.6), cut_short, wide[:, :150], labels)
    assert (memory[4 * 160 + 150 :] == 9).all()


@pytest.mark.parametrize("head_rows", [1, 16])
def test_the_whole_objective_by_the_kernel(monkeypatch: pytest.MonkeyPatch, head_rows: int) -> None:
    monkeypatch.setitem(HEAD_ROWS, DEVICE.type, head_rows)
    shape = {"vocab_size": 90, "end_id": 0}
    student, teacher = (tiny_model("gpt2", seed=seed, **shape).to(DEVICE, torch.float32) for seed in (0, 1))
    batch = collate([0, 1], [[5, 9], [7]], [[3, 4, 0], [8, 88, 6, 0]], max_length=8).to(DEVICE)
    ratio = torch.tensor([0.3, 0.8], device=DEVICE)
    weights = Weights(ratio, 1.0 - ratio)
    known = HiddenStates(response_states(teacher, batch).detach(), aligned(make_head(teacher)))
    found = []
    for by_kernel in (False, True):
        module = module_of(student, 3, fused=by_kernel)
        objective = StageObjective(LOSSES["tsrkl"].bind(), 1.5, 2.25, 0.8)
        student.zero_grad()
        loss, cross_entropy, divergence = module(batch, objective, known, weights)
        loss.backward()
        found.append([cross_entropy, divergence, loss.detach(), *(p.grad for p in student.parameters())])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_no_token_is_no_work() -> None:
    values = fused_objective(*rows(30, count=0), StageObjective(LOSSES["fkl"].bind(), 1.0, 1.0, 0.5))
    assert [len(value) for value in values] == [0, 0, 0]


def test_logits_that_do_not_fit_are_refused() -> None:
    student, teacher, labels = rows(30)
    objective = StageObjective(LOSSES["fkl"].bind())
    for one, other in ((student.t().contiguous().t(), teacher), (student, teacher[:, :20])):
        with pytest.raises(ValueError, match="contiguous rows"):
            fused_objective(one, other, labels, objective)


def test_what_has_no_kernel_is_named() -> None:
    gpu, fkl = torch.device("cuda"), losses.forward_kl
    for divergence in (None, *(loss.bind() for loss in LOSSES.values())):
        assert never_fused(divergence, gpu, torch.bfloat16) is None
    assert never_fused(fkl, torch.device("cpu"), torch.float32) == "it needs a GPU"
    assert never_fused(fkl, gpu, torch.float64) == "the kernel does not support torch.float64"

    def chi_squared(q: losses.Softmax, p: losses.Softmax, *, weight: float) -> losses.ValueAndSlope:
        return (q.probs - p.probs).square().sum(-1) * weight, q.probs

    for own in (chi_squared, partial(chi_squared, weight=0.5)):
        assert never_fused(own, gpu, torch.float32) == "pocl/losses/kernel.py has no chi_squared"


def test_without_triton_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert never_fused(None, torch.device("cuda"), torch.bfloat16) == "Triton is not installed"


def test_the_kernel_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "never_fused", lambda *about: None)
    for name, dtype in zip(KINDS, [*DTYPES, *DTYPES], strict=True):
        assert why_not_fused(LOSSES[name].bind(), DEVICE, dtype, vocab_size=90) is None
    assert why_not_fused(None, DEVICE, torch.float32, vocab_size=150) is None

    changed = losses.forward_kl

    def doubled(q: losses.Softmax, p: losses.Softmax) -> losses.ValueAndSlope:
        value, slope = changed(q, p)
        return 2 * value, 2 * slope

    # Whoever changes a divergence in pocl/losses/divergences.py alone is not given the kernel's old one.
    monkeypatch.setattr(fused, "_KINDS", (doubled, *fused._KINDS[1:]))
    why = why_not_fused(doubled, DEVICE, torch.float32, vocab_size=150)
    assert why == "the kernel's results differ from torch's operations"

    def fails(*arguments: object) -> None:
        raise RuntimeError("ptxas fatal\nmore")

    monkeypatch.setattr(fused, "fused_objective", fails)
    assert why_not_fused(losses.forward_kl, DEVICE, torch.float32, vocab_size=9) == "the kernel fails: ptxas fatal"


COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pocl.losses import fused
from pocl.losses import kernel

names = kernel.token_objective.arg_names
kinds = {name: "*fp32" for name in names[3:8]} | {"labels": "*i64", "inverse_temperature": "fp32", "parameter": "fp32"}
kinds |= {"student_stride": "i32", "teacher_stride": "i32", "num_entries": "i32", "num_read": "i32"}
told = []
for capability, dtype in ((80, "bf16"), (90, "bf16"), (90, "fp32")):
    for kind in range(7) if capability == 90 and dtype == "bf16" else range(dtype == "fp32", 7, 2):
        constants = {"KIND": kind, "TEMPERED": True, "CROSS_ENTROPY": True, "BLOCK": fused._BLOCK}
        signature = kinds | {"student": "*" + dtype, "teacher": "*" + dtype} | dict.fromkeys(constants, "constexpr")
        whole = [i for i, name in enumerate(names) if signature[name][0] == "*" or name[-6:] in ("stride", "m_read")]
        compiled = triton.compile(
            ASTSource(
                kernel.token_objective,
                {name: signature[name] for name in names},
                constexprs={(names.index(name),): value for name, value in constants.items()},
                attrs={(i,): [["tt.divisibility", 16]] for i in whole},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": fused._WARPS},
        )
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
        used = [int(re.search(name + r":(\\d+)", usage.stdout)[1]) for name in ("REG", "STACK", "LOCAL")]
        told.append([capability, dtype, kind, *used])
print(json.dumps(told))
"""


def test_it_compiles_for_gpus_and_needs_no_more_than_registers(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 7 + 4 + 3  # the older GPU and the other type halve the kinds between them
    for *_, registers, stack, local in told:
        assert 16 <= registers <= 128 and local == 0
        assert stack <= 16  # four numbers, for one divergence on one of them


def test_whoever_insists_on_it_without_a_gpu_is_told(tmp_path: Path) -> None:
    folders = make_folders(tmp_path, "gpt2")
    flags = ["--fused-objective", "on", "--num-dev", 0, "--num-stages", 1, "--difficulty", "length"]
    result = call(train, train_arguments(folders, tmp_path / "out", *flags))
    assert result.status == 2
    assert "--fused-objective on: it needs a GPU; give --fused-objective off" in result.last_line


def test_a_run_says_by_what_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = make_folders(tmp_path, "gpt2")
    monkeypatch.setattr(fused, "never_fused", lambda *about: None)
    monkeypatch.setattr(fused, "_BLOCK", 1024)
    flags = ["--num-train", 8, "--num-dev", 0, "--num-stages", 1, "--epochs", 1, "--bucket-examples", 0]
    losses = {}
    for wanted, said in (("on", "divergence and gradient are computed in one kernel"), ("off", "run folder")):
        arguments = train_arguments(folders, tmp_path / wanted, *flags, "--fused-objective", wanted)
        result = call(train, arguments)
        assert result.status == 0 and said in result.output
        records = read_jsonl(tmp_path / wanted / "tfkl" / "seed10" / "metrics.jsonl")
        losses[wanted] = [record["loss"] for record in records]
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5) and losses["on"]
