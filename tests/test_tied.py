"""A weight that is embedding and head learns by one gradient what autograd gives it by two."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pocl.losses.chunked import distillation_objective
from pocl.losses.head import Head
from pocl.losses.tied import lookups_of, tied_embedding
from pocl.losses.token import Term

IDS = torch.tensor([[3, 1, 4, 1], [5, 1, 2, 6]])
LABELS = torch.tensor([2, 7, 1, 8, 2, 8, 1, 8])


class Model(nn.Module):
    """An embedding, a layer, and the embedding again as head."""

    def __init__(self, dtype: torch.dtype, padding_id: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 6, padding_idx=padding_id)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)

    def states(self) -> Tensor:
        """[8, 6]."""
        return self.layer(self.embedding(IDS)).tanh().flatten(0, 1)

    def gradients(self, *, tie: bool, num_chunks: int) -> list[Tensor]:
        """By every parameter, of half the cross-entropy."""
        with lookups_of(tied_embedding(self.embedding, self.head) if tie else None) as tied:
            states = self.states()
        result = distillation_objective(
            states, Head(self.head), None, None, LABELS, term=Term(), num_chunks=num_chunks, tied=tied
        )
        (result.loss / 2).backward()
        return [parameter.grad for parameter in self.parameters()]


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("padding_id", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_gradient_is_the_sum_of_two(dtype: torch.dtype, padding_id: int | None, num_chunks: int) -> None:
    model = Model(dtype, padding_id)
    one = copy.deepcopy(model).gradients(tie=True, num_chunks=num_chunks)
    two = copy.deepcopy(model).gradients(tie=False, num_chunks=num_chunks)
    assert [gradient.dtype for gradient in one] == [dtype] * len(two)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for found, wanted in zip(one, two, strict=True):
        assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_it_adds_up_over_micro_batches() -> None:
    once, twice = Model(torch.float64, None), Model(torch.float64, None)
    once.gradients(tie=True, num_chunks=2)
    twice.gradients(tie=True, num_chunks=2)
    twice.gradients(tie=True, num_chunks=2)
    torch.testing.assert_close(twice.embedding.weight.grad, 2 * once.embedding.weight.grad)


def test_rows_that_bfloat16_would_swallow_are_added_in_float32() -> None:
    embedding, head = nn.Embedding(4, 2, dtype=torch.bfloat16), nn.Linear(2, 4, bias=False, dtype=torch.bfloat16)
    head.weight = embedding.weight
    with lookups_of(tied_embedding(embedding, head)) as tied:
        states = embedding(torch.full((512,), 3))
    assert tied is not None
    tied.of_head = torch.zeros(4, 2, dtype=torch.bfloat16)
    states.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.tolist() == [[0, 0]] * 3 + [[512, 512]]  # one by one bfloat16 stops at 256


def test_a_second_lookup_is_autograds_own() -> None:
    model = Model(torch.float64, None)
    with lookups_of(tied_embedding(model.embedding, model.head)) as tied:
        states = model.states() + 0.1 * model.embedding(IDS).flatten(0, 1)
    distillation_objective(states, Head(model.head), None, None, LABELS, term=Term(), tied=tied).loss.backward()
    plain = Model(torch.float64, None)
    states = plain.states() + 0.1 * plain.embedding(IDS).flatten(0, 1)
    distillation_objective(states, Head(plain.head), None, None, LABELS, term=Term()).loss.backward()
    torch.testing.assert_close(model.embedding.weight.grad, plain.embedding.weight.grad)


def test_a_backward_pass_that_misses_the_head_is_refused() -> None:
    model = Model(torch.float32, None)
    with lookups_of(tied_embedding(model.embedding, model.head)):
        states = model.states()
    with pytest.raises(RuntimeError, match="before that of the head"):
        states.sum().backward()


def test_only_plain_tied_embeddings_are_taken_and_only_where_they_learn() -> None:
    class Scaled(nn.Embedding):
        """As Gemma's."""

    for embedding in (
        nn.Embedding(9, 6),
        Scaled(9, 6),
        nn.Embedding(9, 6, max_norm=1.0),
        nn.Embedding(9, 6, sparse=True),
    ):
        head = nn.Linear(6, 9, bias=False)
        assert tied_embedding(embedding, head) is None
        head.weight = embedding.weight
        plain = type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.sparse
        assert (tied_embedding(embedding, head) is embedding) == plain
    model = Model(torch.float32, None)
    with torch.no_grad(), lookups_of(model.embedding) as tied:
        assert tied is None
    model.requires_grad_(False)
    with lookups_of(model.embedding) as tied:
        assert tied is None
    assert not model.embedding._forward_hooks
