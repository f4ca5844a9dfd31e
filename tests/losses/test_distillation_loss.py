"""A loss by its name: it is the token objective, summed, in chunks, and it refuses what makes no sense."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pocl.losses
from pocl.common.errors import UserError
from pocl.losses import ALIASES, LOSSES, DistillationLoss, Head, HiddenStates, LossValues, Weights, token_objective
from pocl.losses import distillation_loss as module
from pocl.losses.chunked import chunks_needed

NAMES = ["sft", *LOSSES]
TEMPERED = [name for name, loss in LOSSES.items() if loss.tempered]


def identity(size: int) -> Head:
    """A head whose states are the logits."""
    head = torch.nn.Linear(size, size, bias=False, dtype=torch.float64)
    head.weight.data = torch.eye(size, dtype=torch.float64)
    return Head(head)


@pytest.fixture(scope="module")
def cases(golden: Path) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    """(student's logits [N, V], teacher's, labels [N], temperature) of the golden response tokens."""
    found = []
    for case in json.loads((golden / "losses.json").read_text()):
        labels = torch.tensor(case["labels"])
        student, teacher = (
            torch.tensor(case[f"{model}_logits"], dtype=torch.float64)[labels != -100]
            for model in ("student", "teacher")
        )
        found.append((student, teacher, labels[labels != -100], case["temperature"]))
    return found


def drawn(num_tokens: int = 11) -> tuple[HiddenStates, HiddenStates, Tensor]:
    """Student, teacher and labels; both models' parameters and the student's states want gradients."""
    generator = torch.Generator().manual_seed(0)
    models = []
    for width in (5, 6):
        head = torch.nn.Linear(width, 13, dtype=torch.float64)
        for parameter in head.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        states = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
        models.append(HiddenStates(states, Head(head)))
    models[0].states.requires_grad_()
    return models[0], models[1], torch.randint(13, (num_tokens,), generator=generator)


def gradient(values: LossValues, student: HiddenStates) -> Tensor:
    inputs = (student.states, *student.head.module.parameters())
    return torch.cat([part.flatten() for part in torch.autograd.grad(values.loss, inputs)])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_token_objective_of_the_golden_cases(
    cases: list[tuple[Tensor, Tensor, Tensor, float]], name: str
) -> None:
    loss = DistillationLoss(name, chunk_tokens=2)
    for student_logits, teacher_logits, labels, golden_temperature in cases:
        temperature = golden_temperature if loss.tempered else 1.0
        size, states = student_logits.shape[1], student_logits.clone().requires_grad_()
        student = HiddenStates(states, identity(size))
        teacher = HiddenStates(teacher_logits, identity(size)) if loss.needs_teacher else None
        values = loss(student, teacher, labels, temperature=temperature, kd_ratio=0.7)
        objective = loss.objective(temperature, 0.7)
        losses, cross_entropy, divergence, wanted = token_objective(student_logits, teacher_logits, labels, objective)
        assert values.loss.item() == pytest.approx(losses.sum().item(), rel=1e-12)
        torch.testing.assert_close(values.cross_entropy, cross_entropy, rtol=1e-12, atol=0)
        torch.testing.assert_close(values.divergence, divergence, rtol=1e-10, atol=1e-15)
        values.loss.backward()
        torch.testing.assert_close(states.grad, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_the_sum_over_all_tokens_is_that_over_micro_batches(name: str) -> None:
    loss, (student, teacher, labels) = DistillationLoss(name), drawn()
    whole = loss(student, teacher, labels, kd_ratio=0.6)
    parts = [
        loss(
            HiddenStates(student.states[piece], student.head),
            HiddenStates(teacher.states[piece], teacher.head),
            labels[piece],
            kd_ratio=0.6,
        )
        for piece in (slice(0, 4), slice(4, 11))
    ]
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(sum(gradient(part, student) for part in parts), gradient(whole, student))


def test_the_loss_is_the_weighted_sum_of_what_it_reports() -> None:
    loss, ratio = DistillationLoss("ttvd"), torch.linspace(0, 1, 11, dtype=torch.float64)
    arguments, temperature = drawn(), 1.7
    values = loss(*arguments, temperature=temperature, kd_ratio=0.8)
    wanted = 0.2 * values.cross_entropy.sum() + 0.8 * temperature * values.divergence.sum()
    assert values.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    values = loss(*arguments, temperature=temperature, weights=Weights(ratio, 1.0 - ratio))
    wanted = ((1.0 - ratio) * values.cross_entropy + ratio * temperature * values.divergence).sum()
    assert values.loss.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 11, 100, None])
def test_chunks_change_neither_value_nor_gradient(chunk_tokens: int | None) -> None:
    student, teacher, labels = drawn()
    found, wanted = (
        DistillationLoss("tjsd", chunk_tokens=size)(student, teacher, labels, temperature=1.5, kd_ratio=0.8)
        for size in (chunk_tokens, 11)
    )
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient(found, student), gradient(wanted, student), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("chunk_tokens", "largest"), [(3, 3), (4, 4), (11, 11), (None, 8)])
def test_no_chunk_is_larger_than_wanted_or_than_fits(
    monkeypatch: pytest.MonkeyPatch, chunk_tokens: int | None, largest: int
) -> None:
    seen: list[int] = []
    student, teacher, labels = drawn()
    student.head.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    # 8 tokens of 13 entries: two tensors of logits and 15 of a block, 4 bytes a number; 16 times that is there.
    monkeypatch.setattr(module.os, "sysconf", lambda name: 16 * 4 * 17 * 8 * 13 if name == "SC_PAGE_SIZE" else 1)
    DistillationLoss("fkl", chunk_tokens=chunk_tokens)(student, teacher, labels)
    assert max(seen) <= largest and len(seen) == chunks_needed(11, largest)


def test_where_gradients_are_off_there_are_values_alone() -> None:
    arguments = drawn()
    with torch.no_grad():
        silent = DistillationLoss("rkl")(*arguments)
    assert not silent.loss.requires_grad
    assert silent.loss.item() == pytest.approx(DistillationLoss("rkl")(*arguments).loss.item(), rel=1e-12)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, labels = drawn()
    DistillationLoss("fkl")(student, teacher, labels).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.head.module.parameters())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scaling", ["uniform", "published"])
def test_a_stage_has_its_temperature_its_ratio_and_the_power_of_its_scaling(name: str, scaling: str) -> None:
    loss = DistillationLoss(name, scaling=scaling)
    assert (loss.tempered, loss.needs_teacher) == (name in TEMPERED, True)
    assert loss.power == LOSSES[name].power(scaling)
    temperature = 1.67 if loss.tempered else 1.0
    objective = loss.objective(temperature, 0.8)
    assert (objective.temperature, objective.kd_ratio) == (temperature, 0.8)
    assert objective.scale == temperature ** LOSSES[name].power(scaling)


def test_sft_has_no_divergence_no_ratio_and_reads_no_teacher() -> None:
    loss = DistillationLoss("sft")
    assert (loss.divergence, loss.needs_teacher, loss.tempered, loss.power) == (None, False, False, 0)
    assert loss.objective(kd_ratio=0.7).kd_ratio == 0.0 and loss.objective().divergence is None
    student, teacher, labels = drawn()
    values = loss(student, teacher, labels)
    assert values.loss.item() == loss(student, None, labels).loss.item()
    assert values.loss.item() == pytest.approx(values.cross_entropy.sum().item(), rel=1e-12)
    assert values.divergence.tolist() == [0.0] * 11


@pytest.mark.parametrize(("name", "own"), [("sfkl", "skew"), ("tsrkl", "skew"), ("jsd", "teacher_weight")])
def test_mixture_weights_arrive(name: str, own: str) -> None:
    arguments = drawn()
    default, named, other = (DistillationLoss(name, **given) for given in ({}, {own: 0.1}, {own: 0.4}))
    assert default(*arguments).loss.equal(named(*arguments).loss)
    assert not default(*arguments).loss.isclose(other(*arguments).loss)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_loss_that_it_names(alias: str) -> None:
    assert DistillationLoss(alias) == DistillationLoss(ALIASES[alias])
    assert DistillationLoss(alias).name == ALIASES[alias]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tfkll", {}, "unknown `type` 'tfkll'; did you mean 'tfkl'? (known: sft, fkl, "),
        ("fkl", {"scaling": "publishd"}, "unknown `scaling` 'publishd'; did you mean 'published'? (known: uniform or"),
        ("sfkl", {"skew": 1.0}, "`skew` is 1.0; sfkl needs a value strictly between 0 and 1"),
        ("tjsd", {"teacher_weight": 0.0}, "`teacher_weight` is 0.0; tjsd needs a value strictly between 0 and 1"),
        ("fkl", {"chunk_tokens": 0}, "`chunk_tokens` is 0; it must be at least 1, or None for automatic"),
    ],
)
def test_a_loss_that_does_not_exist_is_refused(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        DistillationLoss(name, **options)


@pytest.mark.parametrize(
    ("name", "stage", "words"),
    [
        ("fkl", {"temperature": 2.0}, "`temperature` is 2.0, but fkl has T = 1; for a temperature use tfkl"),
        ("sft", {"temperature": 2.0}, "`temperature` is 2.0, but sft has T = 1; for a temperature use tfkl"),
        ("tfkl", {"temperature": 0.0}, "`temperature` is 0.0; it must be above 0 and finite"),
        ("tfkl", {"temperature": math.inf}, "`temperature` is inf; it must be above 0 and finite"),
        ("tfkl", {"kd_ratio": 1.1}, "`kd_ratio` is 1.1; it must be 0 (cross-entropy alone) to 1 (divergence alone)"),
        ("fkl", {"kd_ratio": math.nan}, "`kd_ratio` is nan"),
    ],
)
def test_a_stage_that_does_not_exist_is_refused(name: str, stage: dict[str, float], words: str) -> None:
    loss = DistillationLoss(name)
    for call in (lambda: loss.objective(**stage), lambda: loss(*drawn(), **stage)):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_a_divergence_without_a_teacher_is_refused() -> None:
    student, _, labels = drawn()
    with pytest.raises(ValueError, match="`teacher` is None, but fkl distils from one"):
        DistillationLoss("kd")(student, None, labels)


def test_rows_and_vocabularies_that_differ_are_refused() -> None:
    student, teacher, labels = drawn()
    with pytest.raises(ValueError, match="11 student states, 11 teacher states and 10 labels"):
        DistillationLoss("fkl")(student, teacher, labels[:10])
    wider = HiddenStates(torch.zeros(11, 5), Head(torch.nn.Linear(5, 14)))
    with pytest.raises(ValueError, match="the student's head gives 13 logits, the teacher's 14"):
        DistillationLoss("fkl")(student, wider, labels)


def test_what_the_room_exports_is_there() -> None:
    assert {"DistillationLoss", "StageObjective", "distillation_objective"} <= set(pocl.losses.__all__)
    assert all(hasattr(pocl.losses, name) for name in pocl.losses.__all__)
