"""Numbers against numbers: divergences against float64, packing against padding, cached states against online ones."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocl.losses.divergences import LOSSES
from pocl.losses.fused import fused_objective, never_fused
from pocl.losses.token import StageObjective, token_objective
from pocl.models.loading import DTYPES
from pocl.models.packing import never_packed, why_not_packed
from pocl.models.teacher import Teacher
from tools.benchmarking.pairs import PAIRS, build_model, load_examples
from tools.gpu_checking.lines import Check, NotChecked, Wrong

# The gradient is compared as a share of its norm: what float64 inputs rounded to this type may differ by, twice over.
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
VALUES = 1e-4  # values are computed in float32 from logits that are rounded already
NUM_TOKENS = 16

Objective = Callable[[Tensor, Tensor, Tensor, StageObjective], tuple[Tensor, ...]]


def checks(device: torch.device, pairs: list[str], vocab_size: int) -> Iterator[Check]:
    """Every check of numbers on this device."""
    for dtype in ("fp32", "bf16", "fp16"):
        for name, objective in (("torch's operations", by_torch), ("the kernel", by_kernel)):
            find = partial(compare_objectives, objective, device, DTYPES[dtype], vocab_size)
            yield Check(f"{name} against float64, {dtype}, all divergences", find)
    for pair in pairs:
        for dtype in ("fp32", "bf16", "fp16"):
            yield Check(f"packing against padding, {pair}, {dtype}", partial(check_packing, pair, dtype, device))
        dtype = "bf16" if device.type == "cuda" else "fp32"
        yield Check(f"cached states against online, {pair}'s teacher, {dtype}", partial(check_cache, pair, device))


def by_torch(student: Tensor, teacher: Tensor, labels: Tensor, objective: StageObjective) -> tuple[Tensor, ...]:
    """(loss, cross-entropy, divergence, gradient) by torch's operations.  3 x [N], [N, V]."""
    loss, cross_entropy, divergence, gradient = token_objective(student, teacher, labels, objective)
    assert gradient is not None
    return loss, cross_entropy, divergence, gradient


def by_kernel(student: Tensor, teacher: Tensor, labels: Tensor, objective: StageObjective) -> tuple[Tensor, ...]:
    """The same by the GPU's kernel, which leaves the gradient where the student's logits were."""
    why = never_fused(objective.divergence, student.device, student.dtype)
    if why is not None:
        raise NotChecked(why)
    overwritten = student.clone()
    return *fused_objective(overwritten, teacher, labels, objective), overwritten


def compare_objectives(objective: Objective, device: torch.device, dtype: torch.dtype, vocab_size: int) -> str:
    """Values and gradient of every divergence, against the same in float64 on the CPU -> the largest errors."""
    generator = torch.Generator().manual_seed(vocab_size)
    student = (3.0 * torch.randn(NUM_TOKENS, vocab_size, generator=generator)).to(dtype)
    teacher = (student.float() + torch.randn(NUM_TOKENS, vocab_size, generator=generator)).to(dtype)
    labels = torch.randint(vocab_size, (NUM_TOKENS,), generator=generator)
    worst_value, worst_gradient = (0.0, ""), (0.0, "")
    for name, loss in LOSSES.items():
        temperature = 1.7 if loss.tempered else 1.0
        term = StageObjective(loss.bind(), temperature, temperature**2, 0.6)
        *values, gradient = objective(student.to(device), teacher.to(device), labels.to(device), term)
        *exact, exact_gradient = by_torch(student.double(), teacher.double(), labels, term)
        value = max(apart(found, wanted) for found, wanted in zip(values, exact, strict=True))
        worst_value = max(worst_value, (value, name))
        worst_gradient = max(worst_gradient, (apart(gradient, exact_gradient), name))
        if not value <= VALUES or not apart(gradient, exact_gradient) <= GRADIENT[dtype]:  # also where it is NaN
            raise Wrong(
                f"{name}: values {value:.1e} apart (allowed {VALUES:.0e}), gradient "
                f"{apart(gradient, exact_gradient):.1e} (allowed {GRADIENT[dtype]:.0e})"
            )
    return (
        f"values at most {worst_value[0]:.1e} apart ({worst_value[1]}), gradients {worst_gradient[0]:.1e} "
        f"({worst_gradient[1]}), {vocab_size} entries"
    )


def apart(found: Tensor, wanted: Tensor) -> float:
    """The distance as a share of the norm of what was wanted."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float(torch.norm(found - wanted) / torch.norm(wanted).clamp(min=1e-30))


def check_packing(pair: str, dtype: str, device: torch.device) -> str:
    """The trial that a run makes before it packs, on both models of a pair."""
    for role, shape in zip(("student", "teacher"), PAIRS[pair](), strict=True):
        model = build_model(shape, dtype=dtype, device=device)
        never = never_packed(model, device)
        if never is not None:
            raise NotChecked(never)
        why = why_not_packed(model, device, learns=role == "student")
        del model
        _free(device)
        if why is not None:
            raise Wrong(f"{role}: {why}")
    return "student with its gradient, and teacher, read packed examples as they read each alone"


def check_cache(pair: str, device: torch.device) -> str:
    """A teacher's states from disk are those that it computes, batch by batch, to the last bit or to rounding."""
    shape = PAIRS[pair]()[1]
    dtype = "bf16" if device.type == "cuda" else "fp32"
    split = load_examples(None, 8, max_length=512, vocab_size=shape.vocab_size)
    teacher = Teacher.of(build_model(shape, dtype=dtype, device=device), device)
    batch = split.batch(np.array([5, 1, 6])).to(device)
    online = teacher.states(batch)
    with tempfile.TemporaryDirectory(prefix="pocl-gpu-check-") as folder:
        error = apart(teacher.cached(split, Path(folder) / "states").states(batch), online)
    _free(device)
    allowed = 1e-5 if dtype == "fp32" else 2e-2
    if not error <= allowed:
        raise Wrong(f"the states are {error:.1e} apart (allowed {allowed:.0e})")
    return f"{len(online)} states, {error:.1e} apart"


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
