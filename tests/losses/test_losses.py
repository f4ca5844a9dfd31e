"""Facts about the divergences: the published values, naive loops in float64, and the edges."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pocl.common.errors import UserError
from pocl.losses.divergences import ALIASES, LOSSES, Softmax, loss_type, slope_by_autograd, softmax, through_softmax

PLAIN = ("fkl", "rkl", "jsd", "tvd", "sfkl", "srkl")
NAMES = (*PLAIN, *(f"t{name}" for name in PLAIN))
# Source: shared/golden/README.md.
PUBLISHED_POWER = {name: 0 for name in NAMES} | {"tfkl": 2, "tjsd": 2, "tsrkl": 2}


def probabilities(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Softmax of logits / T."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    """KL(p || q)."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p: Sequence[float], q: Sequence[float], weight: float) -> list[float]:
    """weight * p + (1 - weight) * q."""
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def naive(
    name: str, student: Sequence[float], teacher: Sequence[float], *, skew: float = 0.1, w: float = 0.1
) -> float:
    """The divergence of two distributions, as the table of design.md has it."""
    q, p = student, teacher
    m = mix(p, q, w)
    return {
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: w * kl(p, m) + (1 - w) * kl(q, m),
        "tvd": lambda: 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)),
        "sfkl": lambda: kl(p, mix(p, q, skew)),
        "srkl": lambda: kl(q, mix(p, q, 1 - skew)),
    }[name.removeprefix("t") if name != "tvd" else name]()


def divergence(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, **own: float
) -> Tensor:
    """The divergence of each token under test, differentiable by autograd.  [N, V], [N, V] -> [N]."""
    loss = LOSSES[name].bind(**own)
    return loss(softmax(student_logits, temperature), softmax(teacher_logits, temperature))[0]


def gradient(
    name: str, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, **own: float
) -> Tensor:
    """The gradient of the divergence by the student's logits in closed form.  [N, V], [N, V] -> [N, V]."""
    q, p = softmax(student_logits, temperature), softmax(teacher_logits, temperature)
    _, slope = LOSSES[name].bind(**own)(q, p)
    return through_softmax(slope, q) / temperature


def draw(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    """Normal float64 numbers."""
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=size, size=shape))


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[dict[str, Any]]:
    """The golden cases; none of them is missing a loss."""
    cases = json.loads((golden / "losses.json").read_text())
    assert len(cases) == 2 and all(sorted(case["losses"]) == sorted(NAMES) for case in cases)
    return cases


def golden_logits(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(student logits [B, T, V], teacher logits [B, T, V], mask of the response tokens [B, T])."""
    student = torch.tensor(case["student_logits"], dtype=dtype, requires_grad=True)
    teacher = torch.tensor(case["teacher_logits"], dtype=dtype)
    return student, teacher, torch.tensor(case["labels"]) != -100


def golden_temperature(case: dict[str, Any], name: str) -> float:
    """T of this loss in this case: the plain ones have none."""
    return 1.0 if name in PLAIN else case["temperature"]


@pytest.mark.parametrize("name", NAMES)
def test_divergence_equals_the_golden_value(cases: list[dict[str, Any]], name: str) -> None:
    for case in cases:
        student, teacher, mask = golden_logits(case, torch.float64)
        temperature = golden_temperature(case, name)
        # The golden values divide the logits by T in float32, and go on in float64.
        student, teacher = ((logits[mask].float() / temperature).double() for logits in (student, teacher))
        assert divergence(name, student, teacher).mean().item() == pytest.approx(
            case["losses"][name]["divergence"], abs=1e-9, rel=1e-9
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_the_golden_gradient(
    cases: list[dict[str, Any]], name: str, dtype: torch.dtype, tolerance: float
) -> None:
    for case in cases:
        student, teacher, mask = golden_logits(case, dtype)
        temperature = golden_temperature(case, name)
        scale = temperature ** LOSSES[name].power("published")
        (scale * divergence(name, student[mask], teacher[mask], temperature).mean()).backward()
        # The golden gradients were computed in float32: up to 1e-7 off.
        wanted = torch.tensor(case["losses"][name]["grad"], dtype=torch.float64)
        torch.testing.assert_close(student.grad.double(), wanted, atol=tolerance, rtol=0)
        with torch.no_grad():
            found = scale * gradient(name, student[mask], teacher[mask], temperature) / int(mask.sum())
        torch.testing.assert_close(found.double(), wanted[mask], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_published_scaling_gives_the_published_value(cases: list[dict[str, Any]], name: str) -> None:
    for case in cases:
        student, teacher, mask = golden_logits(case, torch.float64)
        temperature = golden_temperature(case, name)
        values = divergence(name, student[mask], teacher[mask], temperature).tolist()
        if name in ("fkl", "tfkl", "sfkl", "tsfkl"):  # The published code leaves out the teacher's entropy.
            for i, row in enumerate(teacher[mask].tolist()):
                values[i] -= math.fsum(p * math.log(p) for p in probabilities(row, temperature))
        value = temperature ** LOSSES[name].power("published") * sum(values) / len(values)
        assert value == pytest.approx(case["losses"][name]["published_value"], rel=1e-5)  # float32 in the file


def test_cross_entropy_equals_the_golden_value(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        student, _, mask = golden_logits(case, torch.float64)
        labels = torch.tensor(case["labels"])[mask]
        values = -softmax(student[mask]).logp_of(labels)
        assert values.mean().item() == pytest.approx(case["cross_entropy"], rel=1e-6)  # float32 in the file


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.33, 8.0])
@pytest.mark.parametrize("name", NAMES)
def test_divergence_equals_a_naive_loop(name: str, temperature: float) -> None:
    student, teacher = draw(5, 13, size=3.0), draw(5, 13, seed=1, size=3.0)
    for own in (0.1, 0.5, 0.93):
        values = divergence(name, student, teacher, temperature, skew=own, teacher_weight=own)
        wanted = [
            naive(name, probabilities(s, temperature), probabilities(t, temperature), skew=own, w=own)
            for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
        ]
        assert values.tolist() == pytest.approx(wanted, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences_of_a_naive_loop(name: str) -> None:
    student, teacher, temperature, step = draw(1, 7), draw(1, 7, seed=1), 1.5, 1e-5
    p = probabilities(teacher[0].tolist(), temperature)
    wanted = []
    for i in range(7):
        ends = []
        for sign in (1, -1):
            moved = student[0].tolist()
            moved[i] += sign * step
            ends.append(naive(name, probabilities(moved, temperature), p))
        wanted.append((ends[0] - ends[1]) / (2 * step))
    assert gradient(name, student, teacher, temperature)[0].tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("own", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("name", PLAIN)
def test_closed_gradient_equals_autograd_of_the_value(name: str, own: float, temperature: float) -> None:
    student, teacher = draw(50, 23, size=4.0), draw(50, 23, seed=1, size=4.0)
    student[:, 3] = teacher[:, 3] = -torch.inf  # masked by both
    teacher[:10, 5] = -torch.inf  # by one
    student.requires_grad_()
    divergence(name, student, teacher, temperature, skew=own, teacher_weight=own).sum().backward()
    with torch.no_grad():
        found = gradient(name, student, teacher, temperature, skew=own, teacher_weight=own)
    torch.testing.assert_close(found, student.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_closed_gradient_in_float32_is_that_of_float64_over_a_large_vocabulary(name: str) -> None:
    student, teacher = draw(8, 50257, size=3.0), draw(8, 50257, seed=1, size=3.0)
    found, wanted = gradient(name, student.float(), teacher.float()), gradient(name, student, teacher)
    assert (found - wanted).norm() <= 3e-6 * wanted.norm()


def test_a_divergence_without_a_slope_gets_one_by_autograd() -> None:
    @slope_by_autograd
    def chi_squared(q: Softmax, p: Softmax, *, power: float = 1.0) -> Tensor:
        return (power * q.probs**2 / p.probs).sum(-1) - 1.0

    q, p = softmax(draw(4, 9)), softmax(draw(4, 9, seed=1))
    with torch.no_grad():
        value, slope = chi_squared(q, p, power=3.0)
    ratio = q.probs**2 / p.probs
    torch.testing.assert_close(value, 3.0 * ratio.sum(-1) - 1.0)
    torch.testing.assert_close(slope, 6.0 * ratio)
    assert not value.requires_grad and not slope.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_zero_when_student_equals_teacher(name: str, dtype: torch.dtype) -> None:
    logits = draw(16, 31, size=5.0).to(dtype)
    assert divergence(name, logits, logits.clone(), 1.7).abs().max() <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_never_negative(name: str, size: float) -> None:
    values = divergence(name, draw(500, 17, size=size), draw(500, 17, seed=1, size=size), 1.3)
    assert values.min() >= -1e-14
    assert values.max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_entries_that_both_models_mask_count_for_nothing(name: str, dtype: torch.dtype) -> None:
    student, teacher = draw(4, 9).to(dtype), draw(4, 9, seed=1).to(dtype)
    kept = [0, 1, 3, 4, 6, 7]
    wanted = [
        naive(name, probabilities(s, 2.0), probabilities(t, 2.0))
        for s, t in zip(student[:, kept].tolist(), teacher[:, kept].tolist(), strict=True)
    ]
    student[:, [2, 5, 8]] = teacher[:, [2, 5, 8]] = -torch.inf
    student.requires_grad_()
    values = divergence(name, student, teacher, 2.0)
    values.sum().backward()
    assert values.tolist() == pytest.approx(wanted, rel=1e-9 if dtype == torch.float64 else 1e-5)
    assert torch.isfinite(student.grad).all()
    assert student.grad[:, kept].abs().max() > 0 and student.grad[:, [2, 5, 8]].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_that_one_model_masks_leaves_value_and_gradient_finite(name: str) -> None:
    for masks_student in (True, False):
        student, teacher = draw(3, 6).float(), draw(3, 6, seed=1).float()
        (student if masks_student else teacher)[:, 2] = -torch.inf
        student.requires_grad_()
        values = divergence(name, student, teacher)
        values.sum().backward()
        assert torch.isfinite(values).all() and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [250.0, 2000.0])
def test_a_large_gap_of_logits_gives_the_limit(gap: float, dtype: torch.dtype) -> None:
    # All of p stands on entry 0 and all of q on entry 1, so every sum has one term.
    wanted = {
        "fkl": gap,
        "rkl": gap,
        "jsd": 0.1 * math.log(1 / 0.1) + 0.9 * math.log(1 / 0.9),
        "tvd": 1.0,
        "sfkl": math.log(1 / 0.1),
        "srkl": math.log(1 / 0.1),
    }
    teacher = torch.tensor([[gap, 0.0]], dtype=dtype)
    for name, value in wanted.items():
        student = torch.tensor([[0.0, gap]], dtype=dtype, requires_grad=True)
        result = divergence(name, student, teacher)
        result.sum().backward()
        assert result.item() == pytest.approx(value, rel=1e-6), name
        assert torch.isfinite(student.grad).all(), name


def test_the_forward_gradient_survives_a_large_gap() -> None:
    student = torch.tensor([[0.0, 400.0]], requires_grad=True)
    divergence("fkl", student, torch.tensor([[400.0, 0.0]])).sum().backward()
    assert student.grad.tolist() == [[-1.0, 1.0]]  # q - p


def gradient_size(name: str, temperature: float, scaling: str) -> float:
    """Norm of the gradient of T^k D for logits that are nearly uniform."""
    student, teacher = draw(8, 50, size=0.05).requires_grad_(), draw(8, 50, seed=1, size=0.05)
    scale = temperature ** LOSSES[name].power(scaling)
    (scale * divergence(name, student, teacher, temperature)).sum().backward()
    return student.grad.norm().item()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in PLAIN])
def test_uniform_scaling_keeps_the_gradients_size_as_the_temperature_rises(name: str) -> None:
    sizes = [gradient_size(name, temperature, "uniform") for temperature in (1.0, 2.0, 4.0, 8.0)]
    assert [size / sizes[0] for size in sizes] == pytest.approx([1.0] * 4, rel=0.1)


@pytest.mark.parametrize(("name", "at_4"), [("trkl", 1 / 16), ("tsfkl", 1 / 16), ("ttvd", 1 / 4), ("tfkl", 1.0)])
def test_published_scaling_lets_some_gradients_shrink(name: str, at_4: float) -> None:
    assert gradient_size(name, 4.0, "published") / gradient_size(name, 1.0, "published") == pytest.approx(
        at_4, rel=0.1
    )


@pytest.mark.parametrize("name", NAMES)
def test_powers_of_the_temperature_are_the_specified_ones(name: str) -> None:
    assert LOSSES[name].power("uniform") == (1 if name in ("tvd", "ttvd") else 2)
    if name not in PLAIN:  # T is 1 elsewhere
        assert LOSSES[name].power("published") == PUBLISHED_POWER[name]


def test_jsd_of_equal_weights_is_symmetric() -> None:
    student, teacher = draw(6, 11), draw(6, 11, seed=1)
    forward = divergence("jsd", student, teacher, teacher_weight=0.5)
    backward = divergence("jsd", teacher, student, teacher_weight=0.5)
    torch.testing.assert_close(forward, backward, rtol=1e-12, atol=0)


def test_jsd_of_other_weights_swaps_weight_and_sides() -> None:
    student, teacher = draw(6, 11), draw(6, 11, seed=1)
    one = divergence("jsd", student, teacher, teacher_weight=0.2)
    other = divergence("jsd", teacher, student, teacher_weight=0.8)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert (one - divergence("jsd", teacher, student, teacher_weight=0.2)).abs().max() > 1e-4


@pytest.mark.parametrize(("skewed", "plain"), [("sfkl", "fkl"), ("srkl", "rkl")])
def test_a_vanishing_skew_gives_the_kl(skewed: str, plain: str) -> None:
    student, teacher = draw(6, 11), draw(6, 11, seed=1)
    wanted = [
        naive(plain, probabilities(s), probabilities(t))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert divergence(skewed, student, teacher, skew=1e-9).tolist() == pytest.approx(wanted, rel=1e-6)


def test_a_vanishing_teacher_weight_gives_the_forward_kl() -> None:
    student, teacher = draw(6, 11), draw(6, 11, seed=1)
    wanted = [kl(probabilities(t), probabilities(s)) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    values = divergence("jsd", student, teacher, teacher_weight=1e-6) / 1e-6
    assert values.tolist() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_log_probabilities_are_in_float32_at_least(dtype: torch.dtype) -> None:
    assert softmax(draw(2, 3).to(dtype)).logp.dtype == torch.float32
    assert softmax(draw(2, 3)).logp.dtype == torch.float64


def test_the_registry_holds_the_twelve_types() -> None:
    assert sorted(LOSSES) == sorted(NAMES)
    assert all(LOSSES[name].name == name for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_t_types_are_tempered(name: str) -> None:
    assert loss_type(name).tempered == (name not in PLAIN)


def test_aliases_mean_the_published_names() -> None:
    assert ALIASES == {"kd": "fkl", "ttvdf": "ttvd"}
    assert loss_type("kd") is LOSSES["fkl"]
    assert loss_type("ttvdf") is LOSSES["ttvd"]


def test_sft_has_no_divergence() -> None:
    assert loss_type("sft") is None


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tfkll", "tfkl"), ("jds", "jsd"), ("TFKL", None), ("fkl-rkl", None), ("", None), (" fkl", "fkl")],
)
def test_an_unknown_type_names_the_closest_and_all(name: str, meant: str | None) -> None:
    with pytest.raises(UserError) as caught:
        loss_type(name)
    message = str(caught.value)
    assert repr(name) in message and "\n" not in message
    assert all(known in message for known in (*NAMES, "sft", "kd", "ttvdf"))
    if meant:
        assert f"did you mean {meant!r}?" in message


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.1, math.nan, math.inf])
def test_mixture_weights_lie_strictly_between_0_and_1(value: float) -> None:
    for name, option in (("sfkl", "skew"), ("tsrkl", "skew"), ("jsd", "teacher_weight")):
        with pytest.raises(UserError, match=f"`{option}` is {value}"):
            LOSSES[name].bind(**{option: value})


def test_a_weight_that_a_type_does_not_take_is_not_checked() -> None:
    student, teacher = draw(2, 5), draw(2, 5, seed=1)
    assert divergence("fkl", student, teacher, skew=7.0, teacher_weight=7.0).equal(divergence("fkl", student, teacher))
