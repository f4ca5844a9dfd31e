"""Greedy answers are transformers' own; a sampled answer depends on the seed and the example id alone."""

import copy
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from pocl.common import distributed
from pocl.generation.decoding import BuiltIn, _Watch, answer_prompts, decode, even_blocks, generate
from pocl.generation.kv_cache import RoomyLayer
from pocl.generation.reading import takes_whole_masks
from pocl.generation.sampling import NgramBan, Sampling, ban_repeated, choose_tokens
from pocl.losses.head import HEAD_ROWS
from pocl.models.attention import attend_by_example, whole_mask
from pocl.models.states import make_head
from pocl.models.student import Student
from tests.tiny import FAMILIES, tiny_model

# Lengths 1 to 14; some repeat themselves, so that a ban of n-grams finds something in the prompt.
PROMPTS = [
    [5, 6, 7],
    [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21],
    [300],
    [44, 45, 44, 45, 44, 45, 44],
    [599, 0, 1, 2],
    [7, 7, 7, 7, 7],
    [301, 17, 523, 17, 301, 17],
    [90, 80],
]
IDS = [31, 4, 15, 92, 65, 35, 89, 79]


def cut(tokens: list[int], eos_ids: Sequence[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return list(itertools.takewhile(lambda token: token not in eos_ids, tokens))


def reference(
    model: PreTrainedModel, prompt: list[int], *, max_new_tokens: int, ngram: int, eos_ids: Sequence[int] = ()
) -> list[int]:
    """What transformers answers to this prompt alone."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        no_repeat_ngram_size=ngram,
        eos_token_id=list(eos_ids) or [10**6],
        pad_token_id=0,
    )
    return cut(output[0, len(prompt) :].tolist(), eos_ids)


def answered(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    ids: Sequence[int],
    sampling: Sampling,
    *,
    eos_ids: Sequence[int] = (),
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The answers of a student that these tokens end, and that may choose these entries of its vocabulary."""
    student: Any = SimpleNamespace(model=model, head=make_head(model, vocab_size), end_ids=list(eos_ids))
    return generate(student, prompts, ids, sampling)


def greedy(model: PreTrainedModel, *, max_new_tokens: int, ngram: int, eos_ids: Sequence[int] = ()) -> list[list[int]]:
    sampling = Sampling(max_new_tokens, temperature=0.0, no_repeat_ngram=ngram)
    return answered(model, PROMPTS, IDS, sampling, eos_ids=eos_ids)


@pytest.mark.parametrize("ngram", [0, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_transformers_own(models: dict[str, PreTrainedModel], family: str, ngram: int) -> None:
    wanted = [reference(models[family], prompt, max_new_tokens=14, ngram=ngram) for prompt in PROMPTS]
    assert greedy(models[family], max_new_tokens=14, ngram=ngram) == wanted
    assert len({tuple(answer) for answer in wanted}) > 4  # the prompt is heard


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_that_end_early_are_transformers_own(models: dict[str, PreTrainedModel], family: str) -> None:
    free = greedy(models[family], max_new_tokens=16, ngram=2)
    eos_ids = [free[0][3], free[1][0], free[2][7], free[3][10]]
    wanted = [reference(models[family], p, max_new_tokens=16, ngram=2, eos_ids=eos_ids) for p in PROMPTS]
    found = greedy(models[family], max_new_tokens=16, ngram=2, eos_ids=eos_ids)
    assert found == wanted == [cut(answer, eos_ids) for answer in free]
    assert len({len(answer) for answer in found}) > 2  # rows finish at different steps


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers_left_padded_batch(
    models: dict[str, PreTrainedModel], family: str
) -> None:
    longest = max(len(prompt) for prompt in PROMPTS)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    output = models[family].generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=[10**6], pad_token_id=0
    )
    assert greedy(models[family], max_new_tokens=12, ngram=0) == output[:, longest:].tolist()


def sampled(
    model: PreTrainedModel, rows: Sequence[int], *, batch_size: int | None = None, **options: float
) -> dict[int, list[int]]:
    """Answers by example id to some of the prompts, in this order, in batches of this size."""
    sampling = Sampling(10, **{"no_repeat_ngram": 3, **options})
    answers = {}
    for start in range(0, len(rows), batch_size or len(rows)):
        part = rows[start : start + (batch_size or len(rows))]
        ids = [IDS[row] for row in part]
        answers |= dict(
            zip(
                ids,
                answered(model, [PROMPTS[r] for r in part], ids, sampling, eos_ids=range(30)),
                strict=True,
            )
        )
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_answers_do_not_depend_on_the_batch(models: dict[str, PreTrainedModel], family: str) -> None:
    model, rows = models[family], list(range(len(PROMPTS)))
    wanted = sampled(model, rows)
    assert len({tuple(answer) for answer in wanted.values()}) > 4
    assert sampled(model, rows, batch_size=1) == wanted
    assert sampled(model, rows, batch_size=3) == wanted
    assert sampled(model, rows[::-1]) == wanted
    assert sampled(model, [6, 1, 4, 0, 7, 3, 2, 5], batch_size=5) == wanted
    assert sampled(model, [2, 5]) == {IDS[2]: wanted[IDS[2]], IDS[5]: wanted[IDS[5]]}


def test_sampled_answers_are_the_same_every_time_and_differ_by_seed(models: dict[str, PreTrainedModel]) -> None:
    rows = list(range(len(PROMPTS)))
    first = sampled(models["gpt2"], rows, seed=10)
    torch.manual_seed(123)  # torch's own generator has no part in it
    assert sampled(models["gpt2"], rows, seed=10) == first
    assert all(first[i] != sampled(models["gpt2"], rows, seed=20)[i] for i in first)


def test_the_same_prompt_gets_other_answers_under_other_ids(models: dict[str, PreTrainedModel]) -> None:
    answers = answered(models["gpt2"], [[5, 6, 7]] * 6, range(6), Sampling(10))
    assert len({tuple(answer) for answer in answers}) == 6


def test_answer_prompts_gives_the_same_texts_in_any_batch(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    answers = [
        answer_prompts(
            BuiltIn(Student(models["gpt2"], tokenizer), batch_size),
            tokenizer,
            PROMPTS,
            IDS,
            sampling=Sampling(10),
            title="answers",
        )
        for batch_size in (1, 3, 8)
    ]
    assert sorted(answers[0]) == sorted(IDS)
    assert answers[0] == answers[1] == answers[2]


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Pearson's statistic."""
    total = sum(counts)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True) if p > 0)


TABLE = [0.5, 0.04, 0.25, 0.01, 0.2]


def frequencies(sampling: Sampling, num_draws: int = 40_000) -> list[int]:
    """How often each token of TABLE is chosen."""
    uniforms = torch.from_numpy(np.random.default_rng(0).random(num_draws))
    logits = torch.tensor(TABLE).log().expand(num_draws, -1)
    return torch.bincount(choose_tokens(logits, uniforms, sampling), minlength=len(TABLE)).tolist()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, TABLE),
        ({"temperature": 2.0}, [p**0.5 for p in TABLE]),
        ({"temperature": 0.5}, [p**2 for p in TABLE]),
        ({"top_k": 1}, [0.5, 0, 0, 0, 0]),
        ({"top_k": 2}, [0.5, 0, 0.25, 0, 0]),
        ({"top_k": 3}, [0.5, 0, 0.25, 0, 0.2]),
        ({"top_k": 5}, TABLE),
        ({"top_k": 99}, TABLE),
        ({"top_p": 0.01}, [0.5, 0, 0, 0, 0]),
        ({"top_p": 0.49}, [0.5, 0, 0, 0, 0]),
        ({"top_p": 0.51}, [0.5, 0, 0.25, 0, 0]),  # the smallest set that holds 0.51
        ({"top_p": 0.8}, [0.5, 0, 0.25, 0, 0.2]),
        ({"top_p": 0.97}, [0.5, 0.04, 0.25, 0, 0.2]),
        ({"top_p": 0.8, "top_k": 2}, [0.5, 0, 0.25, 0, 0]),
        ({"top_p": 0.6, "temperature": 0.5}, [0.25, 0, 0, 0, 0]),  # squared: the first holds 0.71
    ],
)
def test_tokens_are_chosen_as_often_as_they_are_likely(options: dict[str, float], weights: list[float]) -> None:
    counts = frequencies(Sampling(1, **options))
    probabilities = [weight / sum(weights) for weight in weights]
    assert [count > 0 for count in counts] == [p > 0 for p in probabilities]
    assert chi_square(counts, probabilities) < 23.5  # 4 degrees of freedom: 1 in 10,000 exceeds it


def test_a_whole_vocabulary_keeps_its_tail() -> None:
    # 50,000 equal tokens: the uniform numbers at their middles pick each one once.
    size = 50_000
    uniforms = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    chosen = torch.cat(
        [choose_tokens(torch.zeros(len(part), size), part, Sampling(1)) for part in uniforms[-400:].split(100)]
    )
    assert (chosen - torch.arange(size - 400, size)).abs().max() <= 1  # float32 softmax: a middle may fall on an edge


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_masked_token_is_never_chosen(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    assert choose_tokens(logits, torch.tensor([uniform], dtype=torch.float64), Sampling(1)).item() in (1, 3)


def test_temperature_0_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0], [5.0, 3.0, 2.0]])
    sampling = Sampling(1, temperature=0.0, top_k=2, top_p=0.5)
    assert choose_tokens(logits, torch.tensor([0.99, 0.99]), sampling).tolist() == [1, 0]


@pytest.fixture(scope="module")
def babbler() -> PreTrainedModel:
    """A gpt2 of 20 tokens, far from uniform: everything repeats soon."""
    model = tiny_model("gpt2", vocab_size=20, end_id=0).double().eval()
    model.transformer.wte.weight.data.mul_(4)
    return model


def test_first_tokens_have_the_frequencies_of_the_models_distribution(babbler: PreTrainedModel) -> None:
    num_draws = 4000
    with torch.no_grad():
        probabilities = babbler(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1).tolist()
    assert max(probabilities) > 0.15 and num_draws * min(probabilities) > 5
    answers = answered(babbler, [[1, 2, 3]] * num_draws, range(num_draws), Sampling(1))
    counts = torch.bincount(torch.tensor(answers).flatten(), minlength=20).tolist()
    assert chi_square(counts, probabilities) < 50.8  # 19 degrees of freedom: 1 in 10,000 exceeds it


def repeats(tokens: list[int], size: int, start: int) -> bool:
    """Whether an n-gram that ends at or behind ``start`` stood in the tokens before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return any(gram in grams[:i] for i, gram in enumerate(grams) if i + size > start)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_no_ngram_is_repeated_over_prompt_and_answer(babbler: PreTrainedModel, size: int, temperature: float) -> None:
    length = 60  # much longer, and every follower of some n-gram would be banned
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [4, 4, 4, 4, 4, 4, 4, 4, 4], [5]]
    for ban in (size, 0):
        sampling = Sampling(length, temperature=temperature, no_repeat_ngram=ban)
        answers = answered(babbler, prompts, range(3), sampling)
        found = [repeats(p + a, size, len(p)) for p, a in zip(prompts, answers, strict=True)]
        if ban:
            assert not any(found)
        elif size < 4 or temperature == 0:
            assert all(found)  # without a ban they do repeat
        assert [len(answer) for answer in answers] == [length] * 3


def test_an_answer_ends_before_its_first_end_token(models: dict[str, PreTrainedModel]) -> None:
    free = sampled_lists(models["gpt2"], eos_ids=[])
    eos_ids = sorted({free[0][0], free[1][4], free[2][9]})
    answers = sampled_lists(models["gpt2"], eos_ids=eos_ids)
    assert answers == [cut(answer, eos_ids) for answer in free]
    assert answers[0] == [] and len(answers[1]) <= 4
    assert not any(token in eos_ids for answer in answers for token in answer)


def test_any_end_token_of_the_student_ends_an_answer(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    sampling = Sampling(12, no_repeat_ngram=0)
    model = copy.deepcopy(models["gpt2"])
    free = generate(Student(model, tokenizer), PROMPTS, IDS, sampling)
    # As chat models do, whose settings name the end of a turn beside the tokenizer's end of text.
    model.generation_config.eos_token_id = [free[0][3], free[1][4]]
    eos_ids = [tokenizer.eos_token_id, free[0][3], free[1][4]]
    assert generate(Student(model, tokenizer), PROMPTS, IDS, sampling) == [cut(answer, eos_ids) for answer in free]


def sampled_lists(model: PreTrainedModel, *, eos_ids: Sequence[int]) -> list[list[int]]:
    return answered(model, PROMPTS, IDS, Sampling(12, no_repeat_ngram=0), eos_ids=eos_ids)


@pytest.mark.parametrize("limit", [0, 1, 2, 9])
def test_an_answer_is_never_longer_than_max_new_tokens(models: dict[str, PreTrainedModel], limit: int) -> None:
    for temperature in (0.0, 1.0):
        answers = answered(models["gpt2"], PROMPTS, IDS, Sampling(limit, temperature=temperature))
        assert [len(answer) for answer in answers] == [limit] * len(PROMPTS)


def test_a_longer_limit_only_adds_to_an_answer(models: dict[str, PreTrainedModel]) -> None:
    short, long = (answered(models["gpt2"], PROMPTS, IDS, Sampling(limit)) for limit in (5, 11))
    assert short == [answer[:5] for answer in long]


def test_padded_vocabulary_entries_are_never_answered(teacher: PreTrainedModel) -> None:
    prompts, sampling = [[5, 6]] * 300, Sampling(4, no_repeat_ngram=0)
    whole = answered(teacher, prompts, range(300), sampling)
    cut_off = answered(teacher, prompts, range(300), sampling, vocab_size=600)
    assert max(token for answer in whole for token in answer) >= 600
    assert max(token for answer in cut_off for token in answer) < 600


def test_generating_leaves_the_model_as_it_was(models: dict[str, PreTrainedModel]) -> None:
    model = copy.deepcopy(models["gpt2"])
    before: dict[str, Tensor] = copy.deepcopy(model.state_dict())
    for training in (True, False):
        model.train(training)
        answered(model, PROMPTS, IDS, Sampling(3))
        assert model.training is training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_decoding_drops_special_tokens_and_outer_white_space(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("  \n two words \n", add_special_tokens=False)
    assert decode(tokenizer, [[*ids, tokenizer.eos_token_id], []]) == ["two words", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_the_ban_of_a_batch_is_that_of_each_row(size: int) -> None:
    draw = np.random.default_rng(size)
    for length in (1, 2, 5, 40):
        rows = [draw.integers(0, 2, draw.integers(1, length + 1)).tolist() for _ in range(30)]
        tokens = torch.tensor([[-1] * (length - len(row)) + row for row in rows])
        logits = torch.zeros(30, 2)
        ban_repeated(logits, tokens, size)
        wanted = [sorted(set(NgramBan(row, size).banned())) for row in rows]
        assert [row.isinf().nonzero().flatten().tolist() for row in logits] == wanted
        assert length < 40 or any(wanted)
        assert set(logits.unique().tolist()) <= {0.0, -torch.inf}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_known_a_round_late_changes_no_answer(
    models: dict[str, PreTrainedModel], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the loop is not told at once which rows are done."""
    sampling, looks = Sampling(12, temperature=temperature, no_repeat_ngram=2), []
    free = answered(models["gpt2"], PROMPTS, IDS, sampling)
    eos_ids = [answer[3 + i] for i, answer in enumerate(free)]
    wanted = answered(models["gpt2"], PROMPTS, IDS, sampling, eos_ids=eos_ids)

    def late(watch: _Watch, done: Tensor) -> list[bool]:
        before, watch.copied = watch.copied, done.clone()  # type: ignore[assignment]
        looks.append(len(done))
        return [False] * len(done) if before is None else before.tolist()  # type: ignore[union-attr]

    monkeypatch.setattr(_Watch, "look", late)
    assert answered(models["gpt2"], PROMPTS, IDS, sampling, eos_ids=eos_ids) == wanted
    assert wanted == [cut(answer, eos_ids) for answer in free]
    assert min(looks) < len(PROMPTS) and len({len(answer) for answer in wanted}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_masks_give_the_answers_of_transformers_own(models: dict[str, PreTrainedModel], family: str) -> None:
    model = copy.deepcopy(models[family])
    attend_by_example(model)
    assert takes_whole_masks(model) and not takes_whole_masks(models[family])
    for options in ({"temperature": 0.0}, {}):
        sampling = Sampling(12, **options)
        answers = [answered(m, PROMPTS, IDS, sampling) for m in (model, models[family])]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_a_device_wants_behind_a_head_are_never_answered(
    monkeypatch: pytest.MonkeyPatch, models: dict[str, PreTrainedModel], temperature: float
) -> None:
    sampling = Sampling(14, temperature=temperature, no_repeat_ngram=4)
    answers = []
    for multiple in (1, 64):
        monkeypatch.setitem(HEAD_ROWS, "cpu", multiple)
        answers.append(answered(models["gpt2"], PROMPTS, IDS, sampling))
    assert answers[0] == answers[1]


def test_a_model_with_windows_makes_its_own_masks() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=600, intermediate_size=64, sliding_window=5, **sizes)).eval()
    attend_by_example(model)
    assert not takes_whole_masks(model)
    model.config.sliding_window = None
    assert takes_whole_masks(copy.deepcopy(model))


def test_whole_masks_are_causal_and_leave_nobody_without_a_token() -> None:
    seen = torch.tensor([[False, False, True, True], [True, True, True, True]])
    padded, whole = whole_mask(seen, 4)[:, 0].int().tolist()
    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert whole == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert whole_mask(seen, 2)[0, 0].int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]
    assert whole_mask(seen, 1)[:, 0].int().tolist() == [[[0, 0, 1, 1]], [[1, 1, 1, 1]]]


@pytest.mark.parametrize(("count", "ranks", "sizes"), [(0, 1, []), (5, 1, [5]), (65, 1, [33, 32]), (60, 4, [15] * 4)])
def test_prompts_are_cut_evenly_for_all_ranks(
    count: int, ranks: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    blocks = even_blocks(np.arange(count), 64)
    assert [len(block) for block in blocks] == sizes
    assert sorted(i for block in blocks for i in block.tolist()) == list(range(count))


def test_a_cache_with_room_holds_what_transformers_own_holds() -> None:
    roomy, plain, copies = RoomyLayer(), DynamicLayer(), 0
    generator, before = torch.Generator().manual_seed(0), 0
    for step in range(200):
        new = [torch.randn(5 if step < 90 else 3, 2, 30 if step == 0 else 1, 4, generator=generator) for _ in range(2)]
        found, wanted = roomy.update(*new), plain.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length() == 30 + step
        copies += before != (before := found[0].untyped_storage().data_ptr())
        if step == 89:
            kept = torch.tensor([0, 2, 4])
            roomy.reorder_cache(kept)
            plain.batch_select_indices(kept)
            assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)
    assert copies <= 6  # not 200
