"""The objective from states, heads and chunks equals the plain computation from whole logits, position by position."""

import copy
import itertools
import json
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.data.batch import Batch, collate
from pocl.evaluation.likelihood import example_cross_entropy
from pocl.losses.chunked import (
    BLOCK_NUMBERS,
    LossValues,
    automatic_chunk_tokens,
    chunks_needed,
    distillation_objective,
)
from pocl.losses.divergences import LOSSES, slope_by_autograd
from pocl.losses.head import HEAD_ROWS, Head, HiddenStates, aligned
from pocl.losses.token import StageObjective, Weights, token_objective
from pocl.models.states import make_head, response_states
from pocl.models.student import Student
from tests import steps
from tests.parts import module_of
from tests.ranks import on_ranks

END = 0
MAX_LENGTH = 24
# Prompts and responses of several lengths; one response is cut by MAX_LENGTH, one holds the end-of-text inside.
PROMPTS = [[5, 9, 200, 31], [77, 12], [300, 4, 4, 8, 16, 15, 23, 42], [598]]
RESPONSES = [[10, 11, 12, END], [13, END], [599, 51, 52, *range(100, 115), END], [14, END, 15, 16, 17, END]]
NUM_TOKENS = 4 + 2 + 16 + 6
SKEW = 0.1

GPT2_CASES = [
    ("tfkl", 1.33, 2, 0.7),
    ("trkl", 2.0, 2, 1.0),
    ("tjsd", 1.67, 2, 0.8),
    ("ttvd", 2.0, 1, 0.9),
    ("tsfkl", 1.33, 0, 0.7),
    ("tsrkl", 2.0, 2, 1.0),
    ("fkl", 1.0, 2, 0.0),
    ("srkl", 1.0, 2, 0.5),
]
OTHER_CASES = [("tfkl", 1.33, 2, 0.7), ("ttvd", 2.0, 1, 1.0)]
CASES = [("gpt2", *case) for case in GPT2_CASES] + [
    (family, *case) for family, case in itertools.product(("opt", "llama", "qwen2"), OTHER_CASES)
]


def make_batch() -> Batch:
    return collate(range(len(PROMPTS)), PROMPTS, RESPONSES, max_length=MAX_LENGTH)


def naive_divergence(name: str, q: Tensor, p: Tensor) -> Tensor:
    """The table of design.md in probabilities.  [V], [V] -> []."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum()

    m = SKEW * p + (1 - SKEW) * q  # jsd's m, and the mixture of the skewed forward KL
    return {
        "fkl": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: SKEW * kl(p, m) + (1 - SKEW) * kl(q, m),
        "tvd": lambda: (p - q).abs().sum() / 2,
        "sfkl": lambda: kl(p, m),
        "srkl": lambda: kl(q, (1 - SKEW) * p + SKEW * q),
    }[name[-4:] if name[-4:] in ("sfkl", "srkl") else name[-3:]]()


def naive_tokens(
    student: PreTrainedModel, teacher: PreTrainedModel | None, name: str | None, temperature: float, vocab_size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(cross-entropy, divergence) of each response token, one example at a time, without padding, all positions."""
    cross_entropies, divergences = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        sequence = (prompt + response)[:MAX_LENGTH]
        ids = torch.tensor([sequence])
        logits = student(input_ids=ids).logits[0, :, :vocab_size]
        with torch.no_grad():
            wanted = None if teacher is None else teacher(input_ids=ids).logits[0, :, :vocab_size]
        for position in range(len(prompt), len(sequence)):
            row = logits[position - 1]
            cross_entropies.append(row.exp().sum().log() - row[sequence[position]])
            if wanted is not None and name is not None:
                q = (row / temperature).exp() / (row / temperature).exp().sum()
                p = (wanted[position - 1] / temperature).exp() / (wanted[position - 1] / temperature).exp().sum()
                divergences.append(naive_divergence(name, q, p))
    assert len(cross_entropies) == NUM_TOKENS
    return cross_entropies, divergences


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter; none is missing but a bias that nothing reads."""
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.named_parameters())) and any(bool(g.abs().max() > 0) for g in found.values())
    return found


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def values_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Batch,
    objective: StageObjective,
    num_chunks: int,
    vocab_size: int | None,
) -> LossValues:
    """The objective under test, from trunks and heads."""
    known = None
    if teacher is not None:
        with torch.no_grad():
            known = HiddenStates(response_states(teacher, batch), make_head(teacher, vocab_size))
    states = HiddenStates(response_states(student, batch), make_head(student, vocab_size))
    return distillation_objective(states, known, batch.response_labels(), objective, num_chunks=num_chunks)


@pytest.mark.parametrize(("family", "name", "temperature", "power", "ratio"), CASES)
def test_chunked_objective_equals_the_full_logits_computation(
    models: dict[str, PreTrainedModel],
    teacher: PreTrainedModel,
    family: str,
    name: str,
    temperature: float,
    power: int,
    ratio: float,
) -> None:
    student, vocab_size = copy.deepcopy(models[family]), 600
    cross_entropies, divergences = naive_tokens(student, teacher, name, temperature, vocab_size)
    scale = temperature**power
    wanted = sum((1 - ratio) * ce + ratio * scale * d for ce, d in zip(cross_entropies, divergences, strict=True))
    wanted_gradients = gradients(student, wanted)
    objective = StageObjective(LOSSES[name].bind(skew=SKEW, teacher_weight=SKEW), temperature, scale, ratio)
    for num_chunks in (1, 3, 7):
        result = values_of(student, teacher, make_batch(), objective, num_chunks, vocab_size)
        assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert result.cross_entropy.tolist() == pytest.approx([ce.item() for ce in cross_entropies], rel=1e-11)
        assert result.divergence.tolist() == pytest.approx([d.item() for d in divergences], rel=1e-9)
        assert_same_gradients(gradients(student, result.loss), wanted_gradients)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_chunked_sft_objective_equals_the_full_logits_computation(
    models: dict[str, PreTrainedModel], family: str
) -> None:
    student = copy.deepcopy(models[family])
    cross_entropies, _ = naive_tokens(student, None, None, 1.0, 600)
    wanted = sum(cross_entropies)
    wanted_gradients = gradients(student, wanted)
    for num_chunks in (1, 3, 7):
        result = values_of(student, None, make_batch(), StageObjective(), num_chunks, 600)
        assert result.loss.item() == pytest.approx(wanted.item(), rel=1e-12)
        assert result.divergence.tolist() == [0.0] * NUM_TOKENS
        assert_same_gradients(gradients(student, result.loss), wanted_gradients)


def test_the_module_gives_what_the_full_logits_computation_gives(
    models: dict[str, PreTrainedModel], teacher: PreTrainedModel
) -> None:
    student, batch = copy.deepcopy(models["gpt2"]), make_batch()
    cross_entropies, divergences = naive_tokens(student, teacher, "tfkl", 1.33, 600)
    wanted = sum(0.3 * ce + 0.7 * 1.33**2 * d for ce, d in zip(cross_entropies, divergences, strict=True))
    module = module_of(student, 9, 600)
    with torch.no_grad():
        states = HiddenStates(response_states(teacher, batch), make_head(teacher, 600))
    loss, _, divergence = module(batch, StageObjective(LOSSES["tfkl"].bind(), 1.33, 1.33**2, 0.7), states)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert divergence.sum().item() == pytest.approx(sum(divergences).item(), rel=1e-9)


@pytest.mark.parametrize("multiple", [16, 64, 1000])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_rows_that_a_device_wants_behind_a_head_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
    models: dict[str, PreTrainedModel],
    teacher: PreTrainedModel,
    family: str,
    multiple: int,
) -> None:
    student, batch = copy.deepcopy(models[family]), make_batch()
    kd = StageObjective(LOSSES["tfkl"].bind(), 1.33, 1.33**2, 0.7)
    for its_teacher, objective, vocab_size in ((teacher, kd, 600), (None, StageObjective(), None)):
        monkeypatch.setitem(HEAD_ROWS, "cpu", 1)
        plain = values_of(student, its_teacher, batch, objective, 1, vocab_size)
        wanted = gradients(student, plain.loss)
        monkeypatch.setitem(HEAD_ROWS, "cpu", multiple)
        assert aligned(make_head(student)).module.out_features % multiple == 0
        for num_chunks in (1, 4):
            found = values_of(student, its_teacher, batch, objective, num_chunks, vocab_size)
            assert found.divergence.tolist() == pytest.approx(plain.divergence.tolist(), rel=1e-11)
            assert_same_gradients(gradients(student, found.loss), wanted)
            known = None
            if its_teacher is not None:
                known = HiddenStates(response_states(teacher, batch).detach(), make_head(teacher, vocab_size))
            loss, *_ = module_of(student, 7, vocab_size)(batch, objective, known)
            assert_same_gradients(gradients(student, loss), wanted)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (1.0, 2.0), (0.3, 2.0)])
@pytest.mark.parametrize("vocab_size", [None, 5])
def test_a_head_with_a_bias_a_scale_or_a_cap_can_have_rows_behind_it(
    monkeypatch: pytest.MonkeyPatch, scale: float, cap: float | None, vocab_size: int | None
) -> None:
    torch.manual_seed(0)
    module, other = (torch.nn.Linear(3, 7, dtype=torch.float64) for _ in range(2))
    states, labels = torch.randn(20, 3, dtype=torch.float64, requires_grad=True), torch.randint(5, (20,))
    found = []
    for multiple in (1, 16):
        monkeypatch.setitem(HEAD_ROWS, "cpu", multiple)
        head, teacher_head = Head(module, scale, cap, vocab_size), aligned(Head(other, scale, cap, vocab_size))
        result = distillation_objective(
            HiddenStates(states, head),
            HiddenStates(states.detach() + 1.0, teacher_head),
            labels,
            StageObjective(LOSSES["jsd"].bind(), kd_ratio=0.5),
            num_chunks=3,
        )
        parts = torch.autograd.grad(result.loss, (states, module.weight, module.bias))
        found.append([result.divergence, *parts])
    for plain, more in zip(*found, strict=True):
        torch.testing.assert_close(more, plain, rtol=1e-10, atol=1e-12)


def test_a_head_that_needs_no_rows_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(torch.nn.Linear(3, 32))
    assert aligned(head) is head  # a CPU asks for none
    monkeypatch.setitem(HEAD_ROWS, "cpu", 16)
    assert aligned(head) is head
    head.module.weight.data = torch.empty(0)  # its rows are on all ranks, as under ZeRO-3
    monkeypatch.setitem(HEAD_ROWS, "cpu", 64)
    assert aligned(head) is head


def test_a_heads_size_is_its_weights_whatever_the_layer_says(models: dict[str, PreTrainedModel]) -> None:
    """peft's ensure_weight_tying swaps the numbers of a layer, for one."""
    model, found = models["gpt2"], []
    batch, term = collate([0], [[5, 6]], [[7, 8, 0]], max_length=8), StageObjective(LOSSES["fkl"].bind())
    for swapped in (False, True):
        student = copy.deepcopy(model)
        layer = student.get_output_embeddings()
        if swapped:
            layer.in_features, layer.out_features = layer.out_features, layer.in_features
        head = make_head(student)
        assert head.num_logits == len(layer.weight) and aligned(head).num_logits == len(layer.weight)
        module_of(student, 2)(batch, term, None)[0].backward()
        found.append(student.get_input_embeddings().weight.grad)
    assert torch.equal(*found)


def test_heads_see_response_positions_only_and_no_chunk_is_too_large(
    models: dict[str, PreTrainedModel], teacher: PreTrainedModel
) -> None:
    student, teacher, seen = copy.deepcopy(models["gpt2"]), copy.deepcopy(teacher), []
    for model in (student, teacher):
        model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    objective = StageObjective(LOSSES["fkl"].bind(), kd_ratio=1.0)
    values_of(student, teacher, make_batch(), objective, chunks_needed(NUM_TOKENS, 10), 600).loss.backward()
    assert sum(seen) == 2 * NUM_TOKENS  # none is computed again for the backward pass
    assert len(seen) == 2 * 3 and max(seen) <= 10


def test_the_logits_of_one_chunk_exist_at_a_time() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Watched(torch.nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            assert not any(reference() is not None for reference in alive)
            logits = super().forward(states)
            alive.append(weakref.ref(logits))
            return logits

    states = torch.randn(20, 3, requires_grad=True)
    labels = torch.randint(7, (20,))
    student, teacher = (
        HiddenStates(states, Head(Watched(3, 7))),
        HiddenStates(states.detach(), Head(torch.nn.Linear(3, 7))),
    )
    objective = StageObjective(LOSSES["jsd"].bind(), kd_ratio=0.5)
    result = distillation_objective(student, teacher, labels, objective, num_chunks=5)
    assert len(alive) == 5 and not any(reference() is not None for reference in alive)
    result.loss.backward()
    assert states.grad is not None


def test_the_teachers_head_gets_no_gradient(models: dict[str, PreTrainedModel], teacher: PreTrainedModel) -> None:
    student, teacher = copy.deepcopy(models["gpt2"]), copy.deepcopy(teacher)
    objective = StageObjective(LOSSES["fkl"].bind(), kd_ratio=1.0)
    values_of(student, teacher, make_batch(), objective, 3, 600).loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_more_chunks_than_tokens_change_nothing(models: dict[str, PreTrainedModel], teacher: PreTrainedModel) -> None:
    student = copy.deepcopy(models["gpt2"])
    objective = StageObjective(LOSSES["fkl"].bind(), kd_ratio=0.5)
    one = values_of(student, teacher, make_batch(), objective, 1, 600)
    wanted = gradients(student, one.loss)
    many = values_of(student, teacher, make_batch(), objective, NUM_TOKENS + 12, 600)
    assert many.loss.item() == pytest.approx(one.loss.item(), rel=1e-12)
    assert_same_gradients(gradients(student, many.loss), wanted)


@pytest.mark.parametrize(("student_rows", "teacher_rows", "labels"), [(4, 5, 5), (5, 4, 5), (5, 5, 4)])
def test_numbers_of_rows_that_differ_are_refused(student_rows: int, teacher_rows: int, labels: int) -> None:
    head = Head(torch.nn.Linear(3, 7))
    with pytest.raises(ValueError, match=f"{student_rows} student states, {teacher_rows} teacher states and {labels}"):
        distillation_objective(
            HiddenStates(torch.zeros(student_rows, 3), head),
            HiddenStates(torch.zeros(teacher_rows, 3), head),
            torch.zeros(labels, dtype=torch.long),
            StageObjective(LOSSES["fkl"].bind(), kd_ratio=1.0),
        )


def test_heads_of_different_vocabularies_are_refused() -> None:
    student, teacher = (HiddenStates(torch.zeros(2, 3), Head(torch.nn.Linear(3, size))) for size in (7, 9))
    objective = StageObjective(LOSSES["fkl"].bind(), kd_ratio=1.0)
    with pytest.raises(
        ValueError, match="the student's head gives 7 logits, the teacher's 9; cut both .* `vocab_size`"
    ):
        distillation_objective(student, teacher, torch.zeros(2, dtype=torch.long), objective)
    cut = HiddenStates(teacher.states, replace(teacher.head, vocab_size=7))
    assert distillation_objective(student, cut, torch.zeros(2, dtype=torch.long), objective).loss.isfinite()


def padded(batch: Batch, columns: int, rows: int, seed: int) -> Batch:
    """The same examples with columns and rows of random tokens behind them, which have no label."""
    generator = torch.Generator().manual_seed(seed)

    def widen(tensor: Tensor, value: int | None) -> Tensor:
        shape = (tensor.shape[0] + rows, tensor.shape[1] + columns)
        wide = torch.randint(600, shape, generator=generator) if value is None else torch.full(shape, value)
        wide[: tensor.shape[0], : tensor.shape[1]] = tensor
        return wide

    ids = torch.cat([batch.example_ids, torch.arange(rows) + 1000])
    counts = torch.cat([batch.num_labels, torch.zeros(rows, dtype=torch.long)])
    return Batch.of(
        ids, counts, widen(batch.input_ids, None), widen(batch.attention_mask, 0), widen(batch.labels, -100)
    )


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
@pytest.mark.parametrize(("columns", "rows"), [(5, 0), (0, 2), (3, 1)])
def test_padding_changes_nothing(
    models: dict[str, PreTrainedModel], teacher: PreTrainedModel, family: str, columns: int, rows: int
) -> None:
    student, batch = copy.deepcopy(models[family]), make_batch()
    objective = StageObjective(LOSSES["tfkl"].bind(), 1.33, 1.33**2, 0.7)
    plain = values_of(student, teacher, batch, objective, 2, 600)
    wanted = gradients(student, plain.loss)
    more = values_of(student, teacher, padded(batch, columns, rows, seed=3), objective, 2, 600)
    assert more.cross_entropy.tolist() == pytest.approx(plain.cross_entropy.tolist(), rel=1e-11)
    assert more.divergence.tolist() == pytest.approx(plain.divergence.tolist(), rel=1e-11)
    assert_same_gradients(gradients(student, more.loss), wanted)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2"])
def test_the_id_of_the_padding_does_not_matter(models: dict[str, PreTrainedModel], family: str) -> None:
    batch = make_batch()
    results = []
    for pad_id in (END, 1, 599):  # END: padding that looks like the end-of-text, which is a target elsewhere
        ids = batch.input_ids.masked_fill(batch.attention_mask == 0, pad_id)
        result = values_of(models[family], None, replace(batch, input_ids=ids), StageObjective(), 1, 600)
        results.append(result.cross_entropy.tolist())
        assert len(results[-1]) == NUM_TOKENS
    assert results[1] == pytest.approx(results[0], rel=1e-12)
    assert results[2] == pytest.approx(results[0], rel=1e-12)


def test_cross_entropy_of_each_example_is_its_own_sum_and_count(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    cross_entropies, _ = naive_tokens(models["gpt2"], None, None, 1.0, 600)
    wanted, start = [], 0
    for count in (4, 2, 16, 6):
        wanted.append((sum(ce.item() for ce in cross_entropies[start : start + count]), count))
        start += count
    found = example_cross_entropy(Student(models["gpt2"], tokenizer), make_batch(), chunk_tokens=5)
    assert [count for _, count in found] == [count for _, count in wanted]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], rel=1e-12)


def test_a_kd_ratio_of_1_leaves_the_cross_entropy_out() -> None:
    student_logits, labels = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([2])
    student_logits[0, 2] = -torch.inf  # the label is impossible
    loss, _, divergence, gradient = token_objective(
        student_logits, student_logits.clone(), labels, StageObjective(LOSSES["fkl"].bind(), kd_ratio=1.0)
    )
    assert loss.tolist() == divergence.tolist() == [0.0]
    assert gradient.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("tokens", "limit", "chunks"), [(0, 8, 1), (1, 8, 1), (8, 8, 1), (9, 8, 2), (17, 8, 3)])
def test_chunks_are_as_few_as_the_limit_allows(tokens: int, limit: int, chunks: int) -> None:
    assert chunks_needed(tokens, limit) == chunks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_automatic_chunks_are_halved_until_they_fit_a_sixteenth_of_memory(device: str) -> None:
    # Two tensors of logits, 4 x 50,257 bytes a token, and 15 of a block of 2^19 numbers take 0.08 GB at 128 tokens.
    assert automatic_chunk_tokens(50_257, 8 * 10**9, "cpu") == 128
    assert automatic_chunk_tokens(50_257, 12 * 10**8, "cpu") == 64
    assert automatic_chunk_tokens(50_257, 3 * 10**9, device) == {"cpu": 128, "cuda": 32}[device]
    assert automatic_chunk_tokens(600, 10**15, device) == {"cpu": 128, "cuda": 4096}[device]
    assert automatic_chunk_tokens(10**6, 10**6, device) == 1


# The largest error allowed beside the size of the whole gradient or value. bfloat16 keeps 8 bits: the gradient by the
# logits and what comes out of the head are each off by up to 0.4 %.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Random states and heads of 29 tokens over 101 entries, and the objective that is wanted of them."""

    dtype: torch.dtype
    tied: bool

    def inputs(self) -> tuple[Tensor, torch.nn.Linear, Tensor, torch.nn.Linear, Tensor]:
        """(inputs of the trunk, student's head, teacher's states, teacher's head, labels), exact in ``dtype``."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        heads = []
        for width in (16, 24):
            heads.append(torch.nn.Linear(width, 101, bias=not self.tied, dtype=self.dtype))
            for parameter in heads[-1].parameters():
                parameter.data = draw(*parameter.shape) / 2
        return draw(29, 16), heads[0], draw(29, 24), heads[1], torch.randint(101, (29,), generator=generator)

    def both(self) -> tuple[HiddenStates, HiddenStates, Tensor]:
        """(student, teacher, labels); the student's states want a gradient."""
        states, head, teacher_states, teacher_head, labels = self.inputs()
        student = HiddenStates(states.requires_grad_(), Head(head))
        return student, HiddenStates(teacher_states, Head(teacher_head)), labels

    def states(self, inputs: Tensor, head: torch.nn.Linear) -> Tensor:
        """What a trunk would make of its inputs; tied, its embeddings are the head's weight."""
        return inputs + head.weight[:29].to(self.dtype) if self.tied else inputs


def naive_objective(
    name: str,
    inputs: tuple[Tensor, torch.nn.Linear, Tensor, torch.nn.Linear, Tensor],
    tied: bool,
    objective: StageObjective,
    by_token: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """The value and the gradients of the inputs and the student's head, from whole logits in float64 by autograd.

    What goes into a head and comes out is rounded to what it computes in: total variation's gradient jumps where p
    and q cross.
    """
    states, head, teacher_states, teacher_head, labels = inputs

    def rounded(x: Tensor) -> Tensor:
        return x + (x.to(head.weight.dtype).double() - x).detach()

    weights, teacher_weights = (
        [parameter.detach().double().requires_grad_() for parameter in module.parameters()]
        for module in (head, teacher_head)
    )
    states = states.detach().double().requires_grad_()
    trunk = rounded(states + weights[0][:29]) if tied else states
    logits = rounded(torch.nn.functional.linear(trunk, *weights))
    teacher_logits = rounded(torch.nn.functional.linear(teacher_states.double(), *teacher_weights))
    q, p = ((z / objective.temperature).softmax(-1) for z in (logits, teacher_logits))
    total = logits.new_zeros(())
    for i in range(29):
        if name != "sft":
            total = total + by_token[0][i] * objective.scale * naive_divergence(name, q[i], p[i])
        total = total - by_token[1][i] * logits[i].softmax(-1)[labels[i]].log()
    return [total.detach(), *torch.autograd.grad(total, [states, *weights])]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["sft", *LOSSES])
def test_value_and_gradients_equal_those_of_whole_logits_in_float64(
    name: str, dtype: torch.dtype, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(dtype, tied)
    divergence = None if name == "sft" else LOSSES[name].bind(skew=SKEW, teacher_weight=SKEW)
    temperature = 1.7 if name != "sft" and LOSSES[name].tempered else 1.0
    ratio = torch.linspace(0, 1, 29, dtype=torch.float64)
    some = torch.where(torch.arange(29) % 3 == 0, 0.0, 1.0 - ratio)  # the student's own text has no cross-entropy
    for weights, kd_ratio in ((None, 0.6), (None, 1.0), ((ratio, 1.0 - ratio), 1.0), ((ratio, some), 0.3)):
        if name == "sft" and (weights is not None or kd_ratio != 0.6):
            continue
        objective = StageObjective(divergence, temperature, temperature**2, 0.0 if name == "sft" else kd_ratio)
        of_all = torch.full((29,), objective.kd_ratio, dtype=torch.float64)
        value, *wanted = naive_objective(name, case.inputs(), tied, objective, weights or (of_all, 1.0 - of_all))
        gradient = torch.cat([tensor.flatten() for tensor in wanted])
        given = weights and Weights(*(part.to(torch.promote_types(dtype, torch.float32)) for part in weights))
        cuts = [(3, 4), (5000, 40)] if weights else [(3, 1), (3, 4), (5000, 1), (5000, 4), (5000, 40)]
        for block_rows, num_chunks in cuts:  # 40: a chunk a token
            monkeypatch.setitem(BLOCK_NUMBERS, "cpu", block_rows * 101)
            inputs, head, teacher_states, teacher_head, labels = case.inputs()
            student = HiddenStates(case.states(inputs.requires_grad_(), head), Head(head))
            teacher = HiddenStates(teacher_states, Head(teacher_head))
            result = distillation_objective(student, teacher, labels, objective, weights=given, num_chunks=num_chunks)
            (result.loss / 8).backward()
            assert abs(result.loss.item() - value.item()) <= TOLERANCES[dtype] * abs(value.item())
            found = torch.cat([8 * tensor.grad.double().flatten() for tensor in (inputs, *head.parameters())])
            assert (found - gradient).norm() <= TOLERANCES[dtype] * gradient.norm()


def test_a_divergence_known_by_its_value_alone_trains_alike() -> None:
    student, teacher, labels = Case(torch.float64, tied=False).both()
    closed = LOSSES["srkl"].bind()
    found = []
    for divergence in (closed, slope_by_autograd(lambda q, p: closed(q, p)[0])):
        student.states.grad = student.head.module.weight.grad = None
        objective = StageObjective(divergence, 1.5, 2.25, 0.7)
        distillation_objective(student, teacher, labels, objective, num_chunks=3).loss.backward()
        found.append((student.states.grad, student.head.module.weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_only_the_loss_carries_a_gradient_and_only_where_gradients_are_on() -> None:
    arguments = (*Case(torch.float32, tied=False).both(), StageObjective(LOSSES["fkl"].bind(), kd_ratio=0.5))
    result = distillation_objective(*arguments)
    assert result.loss.requires_grad
    assert not result.cross_entropy.requires_grad and not result.divergence.requires_grad
    with torch.no_grad():
        silent = distillation_objective(*arguments)
    assert not silent.loss.requires_grad
    assert silent.loss.item() == result.loss.item()


def test_a_frozen_head_passes_the_gradient_on_and_gets_none() -> None:
    student, teacher, labels = Case(torch.float32, tied=False).both()
    student.head.module.requires_grad_(False)
    distillation_objective(student, teacher, labels, StageObjective(), num_chunks=2).loss.backward()
    assert student.head.module.weight.grad is None and bool(student.states.grad.abs().max() > 0)


def test_shared_out_heads_train_as_whole_ones(tmp_path: Path) -> None:
    """ZeRO-3 that keeps no weight whole, on two ranks whose chunks are others than one rank's, tied and untied."""
    whole, shared_out, output = tmp_path / "zero1.json", tmp_path / "zero3.json", tmp_path / "curves.json"
    whole.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    nothing_kept = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    shared_out.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": False} | nothing_kept}))
    wanted = steps.curves(whole)
    result = on_ranks("tests/steps.py", [shared_out, output], num_ranks=2)
    assert result.status == 0, result.output
    found = json.loads(output.read_text())
    assert found.keys() == wanted.keys() == {"gpt2", "llama"}
    for family, curve in wanted.items():
        assert len(curve) == steps.STEPS
        for one, other in zip(curve, found[family], strict=True):
            assert other == pytest.approx(one, rel=1e-4)
