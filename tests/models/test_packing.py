"""Packed micro-batches: the same objective, gradients and curves as padded ones; none where a model mixes them."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import train
from pocl.data.batch import Segments, collate
from pocl.data.micro_batches import MicroBatchLimits, cut
from pocl.losses.divergences import LOSSES
from pocl.losses.head import HiddenStates
from pocl.losses.token import StageObjective, Weights
from pocl.models import attention
from pocl.models.attention import attend_by_example, attention_by_example
from pocl.models.loading import load_model
from pocl.models.packing import never_packed, why_not_packed
from pocl.models.states import make_head, response_states
from pocl.models.tuning import recompute_activations
from tests.parts import module_of
from tests.runs import Folders, call, make_folders, read_jsonl, train_arguments
from tests.tiny import FAMILIES, save_model, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 200, 31], [77, 12], [300, 4, 4, 8, 16, 15, 23, 42], [598]]
RESPONSES = [[10, 11, 12, 0], [13, 0], [599, 51, 52, *range(100, 115), 0], [14, 0, 15, 16, 17, 0]]


def test_a_packed_batch_holds_every_example_once_and_nothing_else() -> None:
    batch = collate([3, 1, 4, 5], PROMPTS, RESPONSES, max_length=24)
    packed = batch.packed()
    sequences = [(prompt + response)[:24] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert packed.input_ids.tolist() == [[token for sequence in sequences for token in sequence[:-1]]]
    assert packed.position_ids.tolist() == [[i for sequence in sequences for i in range(len(sequence) - 1)]]
    assert packed.example_ids.tolist() == [3, 1, 4, 5]
    assert packed.num_labels.tolist() == batch.num_labels.tolist() == [4, 2, 16, 6]
    assert packed.num_response_tokens == batch.num_response_tokens == 28
    kept = batch.labels[batch.labels != -100]
    assert packed.labels[packed.labels != -100].tolist() == kept.tolist()


def ways() -> list[tuple[str, str]]:
    """(family, attention) that keep packed examples apart; OPT's own takes no notice of positions in its mask."""
    others = [(family, way) for family in FAMILIES if family != "opt" for way in ("sdpa", "eager")]
    return [(family, attention.NAME) for family in FAMILIES] + others


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(("family", "way"), ways())
def test_packed_states_objective_and_gradients_are_the_padded_ones(family: str, way: str, checkpointing: bool) -> None:
    student = tiny_model(family, vocab_size=600, end_id=0).double()
    teacher = tiny_model(family, vocab_size=600, end_id=0, num_layers=3).double()
    term = StageObjective(LOSSES["tjsd"].bind(), 1.5, 2.25, 0.7)
    ratio = torch.tensor([0.2, 1.0, 0.5, 0.0], dtype=torch.float64)
    weights = Weights(ratio, 1.0 - ratio)
    padded = collate(range(4), PROMPTS, RESPONSES, max_length=24)
    found = []
    for batch, chosen in ((padded, "sdpa" if way == attention.NAME else way), (padded.packed(), way)):
        model: PreTrainedModel = copy.deepcopy(student).train()
        for which in (model, teacher):
            which.set_attn_implementation("sdpa" if chosen == attention.NAME else chosen)
            if chosen == attention.NAME:
                attend_by_example(which)
            assert which.config._attn_implementation == chosen
        if checkpointing:
            recompute_activations(model)
        with torch.no_grad():
            states = response_states(teacher, batch)
        parts = module_of(model, 10)(batch, term, HiddenStates(states, make_head(teacher)), weights)
        parts[0].backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([*parts, states, *gradients])
    assert len(found[0]) > 10
    tolerance = 1e-6 if way == "eager" else 1e-9  # eager takes its softmax in float32
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_by_example_is_that_of_each_example_alone(device: str, window: int | None, key_heads: int) -> None:
    """In values and gradients, with a window, with fewer keys than queries; float64."""
    torch.manual_seed(0)
    lengths, heads = (3, 9, 1, 6), 4
    shapes = [(heads, 19, 8), (key_heads, 19, 8), (key_heads, 19, 8)]
    states = [torch.randn(1, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True)
    options = {"scaling": 0.3, "dropout": 0.0, "sliding_window": window}
    segments = Segments.of(torch.tensor(lengths))
    if device == "cpu":
        attended, _ = attention_by_example(module, *states, None, segments=segments, **options)
    else:
        with flash_attention_on_the_cpu() as calls:
            attended = attention._at_once(*states, segments, window, scaling=0.3)
            weights = torch.linspace(-1, 1, attended.numel(), dtype=torch.float64).reshape(attended.shape)
            found = torch.autograd.grad((attended * weights).sum(), states)
        assert calls == ["forward", "backward"]
    parts = (part.split(lengths, dim=2) for part in states)
    wanted = torch.cat([naive(*part, 0.3, window) for part in zip(*parts, strict=True)], dim=1)
    weights = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).reshape(wanted.shape)
    assert attended.shape == (1, 19, heads, 8)
    torch.testing.assert_close(attended, wanted, rtol=1e-12, atol=1e-12)
    if device == "cpu":
        found = torch.autograd.grad((attended * weights).sum(), states)
    torch.testing.assert_close(found, torch.autograd.grad((wanted * weights).sum(), states), rtol=1e-12, atol=1e-12)


def naive(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of one example, written out.  [1, heads, L, D], [1, key heads, L, D] x 2 -> [1, L, heads, D]."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    behind = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (behind >= 0) & (behind < (window or length))
    scores = (scale * query @ key.mT).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@contextmanager
def flash_attention_on_the_cpu() -> Iterator[list[str]]:
    """torch's operator of flash attention, which has kernels for GPUs alone, as its documentation describes it."""
    calls: list[str] = []

    def probabilities(query: Tensor, key: Tensor, causal: bool, named: Mapping[str, Any]) -> Tensor:
        """[L, heads, D], [L, heads, D] -> [heads, L, L]."""
        left, right = named["window_size_left"], named["window_size_right"]
        assert right == 0 and causal == (left == -1)
        behind = torch.arange(len(query))[:, None] - torch.arange(len(query))[None]
        seen = (behind >= 0) & ((behind <= left) | (left < 0))
        scores = named["scale"] * query.transpose(0, 1) @ key.permute(1, 2, 0)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def examples(offsets: Tensor, longest: int, *states: Tensor) -> Iterator[list[Tensor]]:
        """The tensors [N, heads or key heads, D] of each example, with as many heads."""
        assert offsets.dtype == torch.int32 and longest == int(offsets.diff().max())
        for a, b in pairwise(offsets.tolist()):
            yield [part[a:b].repeat_interleave(states[0].shape[1] // part.shape[1], dim=1) for part in states]

    def forward(
        query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, other_offsets: Tensor, longest: int,
        other_longest: int, dropout: float, causal: bool, debug: bool, **named: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls.append("forward")
        assert offsets is other_offsets and longest == other_longest and dropout == 0.0 and not debug
        attended = [
            (probabilities(q, k, causal, named) @ v.transpose(0, 1)).transpose(0, 1)
            for q, k, v in examples(offsets, longest, query, key, value)
        ]
        nothing = query.new_zeros(0)
        return torch.cat(attended), query.new_zeros(query.shape[1], len(query)), nothing, nothing, nothing

    def backward(
        by_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor,
        offsets: Tensor, other_offsets: Tensor, longest: int, other_longest: int, dropout: float, causal: bool,
        *state: Tensor, **named: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls.append("backward")
        found = []
        for q, k, v, g in examples(offsets, longest, query, key, value, by_output):
            p, by_output_rows = probabilities(q, k, causal, named), g.transpose(0, 1)
            by_p = by_output_rows @ v.permute(1, 2, 0)
            by_scores = named["scale"] * p * (by_p - (by_p * p).sum(-1, keepdim=True))
            by_rows = by_scores @ k.transpose(0, 1), by_scores.mT @ q.transpose(0, 1), p.mT @ by_output_rows
            found.append([rows.transpose(0, 1) for rows in by_rows])
        by_query, by_key, by_value = (torch.cat(column) for column in zip(*found, strict=True))
        groups = key.shape[1], query.shape[1] // key.shape[1]
        return by_query, *(rows.unflatten(1, groups).sum(2) for rows in (by_key, by_value))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()


def test_what_attends_otherwise_is_not_packed() -> None:
    states = [torch.randn(1, 2, 3, 4)] * 3
    with pytest.raises(ValueError, match="softcap"):
        attention_by_example(None, *states, None, segments=Segments.of(torch.tensor([1, 2])), softcap=30.0)  # type: ignore[arg-type]
    gemma = Gemma2Config(
        vocab_size=600, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, head_dim=8,
    )  # fmt: skip
    model = Gemma2ForCausalLM(gemma).eval()
    attend_by_example(model)
    if model.config._attn_implementation == attention.NAME:
        assert "softcap" in str(why_not_packed(model, CPU))
    chunked = tiny_model("llama", vocab_size=600, end_id=0)
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    assert why_not_packed(chunked, CPU) == "llama has layers of chunked_attention"
    gpu = torch.device("cuda")
    assert "bf16" in str(never_packed(tiny_model("gpt2", vocab_size=600, end_id=0), gpu))
    assert never_packed(tiny_model("gpt2", vocab_size=600, end_id=0).bfloat16(), gpu) is None


def test_a_model_that_mixes_packed_examples_is_found_out() -> None:
    said = "does not keep packed examples apart"
    assert said in str(why_not_packed(tiny_model("opt", vocab_size=600, end_id=0), CPU))
    for dtype in (torch.float32, torch.bfloat16):
        mixing = tiny_model("llama", vocab_size=600, end_id=0).to(dtype)
        assert why_not_packed(mixing, CPU) is None and why_not_packed(mixing, CPU, learns=False) is None
        forward = mixing.base_model.forward
        mixing.base_model.forward = lambda input_ids, position_ids=None, forward=forward, **_: forward(
            input_ids, use_cache=False
        )
        assert "takes no position_ids" not in str(why_not_packed(mixing, CPU))
        assert said in str(why_not_packed(mixing, CPU)) and said in str(why_not_packed(mixing, CPU, learns=False))


def test_the_name_of_the_attention_is_in_no_model_folder(tmp_path: Path) -> None:
    model = tiny_model("gpt2", vocab_size=600, end_id=0)
    attend_by_example(model)
    save_model(model, tiny_tokenizer(), tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    assert load_model(str(tmp_path)).config._attn_implementation == attention.NAME
    assert load_model(str(tmp_path), attention_name="eager").config._attn_implementation == "eager"


RANKED_AGAIN = ["--difficulty", "student", "snapshot", "--rerank", "stage"]


@pytest.mark.parametrize(
    "extra",
    [
        ["--type", "tfkl", "--teacher-cache", "off"],
        [
            "--type",
            "fkl",
            "--selective-reliance",
            "linear",
            "--difficulty",
            "student",
            "snapshot",
            "--rerank",
            "stage",
        ],
        ["--type", "fkl", "--on-policy", "mixed", "--replay-buffer", 8],
        ["--type", "sft", "--gradient-checkpointing"],
    ],
    ids=["online", "reliance", "on-policy", "sft"],
)
def test_a_packed_run_follows_the_padded_curve(folders: Folders, tmp_path: Path, extra: list[object]) -> None:
    ends = []
    for packing in ("on", "off"):
        flags = ["--num-train", 32, "--num-stages", 2, "--num-dev", 0, "--packing", packing, *extra]
        result = call(train, train_arguments(folders, tmp_path / packing, *flags, teacher="sft" not in extra))
        assert result.status == 0, result.output
        assert ("micro-batches are packed" in result.output) == (packing == "on")
        run = tmp_path / packing / str(extra[1]) / "seed10"
        curve = [(record["loss"], record["gradient_norm"]) for record in read_jsonl(run / "metrics.jsonl")]
        ledger = json.loads((run / "ledger.json").read_text())
        ends.append((np.array(curve), ledger["tokens"], ledger["response_tokens"]))
    # Where the student writes, another rounding may draw another token.
    if "--on-policy" not in extra:
        np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-4)
        assert ends[0][1:] == ends[1][1:]
    assert len(ends[0][0]) == len(ends[1][0]) > 4


def test_a_model_that_cannot_be_packed_is_padded_or_refused(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "opt", "opt")
    shared = ["--type", "sft", "--num-dev", 0, "--num-stages", 1, "--num-train", 8]
    for attention_name, packing, said in (
        ("sdpa", "on", "--packing on is not possible for the student: opt with sdpa does not keep packed"),
        ("auto", "auto", "micro-batches are packed, without padding"),
    ):
        flags = [*shared, "--attention", attention_name, "--packing", packing]
        result = call(train, train_arguments(folders, tmp_path / "out", *flags, teacher=False))
        assert said in result.output
        assert result.status == (2 if packing == "on" else 0), result.output
        assert (tmp_path / "out" / "sft" / "seed10").exists() == (packing == "auto")
    with mock.patch("pocl.cli.build.why_not_packed", lambda model, device, **_: "it mixes them"):
        result = call(train, train_arguments(folders, tmp_path / "other", *shared, teacher=False))
    assert result.status == 0
    assert "micro-batches are padded, as they cannot be packed for the student: it mixes them" in result.output


def test_an_attention_that_is_not_there_is_refused(folders: Folders, tmp_path: Path) -> None:
    flags = ["--attention", "flash_attention_2", "--num-dev", 0]
    result = call(train, train_arguments(folders, tmp_path / "out", *flags))
    assert result.status == 2 and "cannot load a model from" in result.last_line
    assert not (tmp_path / "out").exists()


def test_a_packed_cut_counts_no_padding_and_is_even() -> None:
    def cut_packed(widths: list[int], max_tokens: int, batch_size: int | None = None) -> list[slice]:
        return cut(np.array(widths), MicroBatchLimits(max_tokens, batch_size, overhead=5, packed=True))

    widths = [100, 40, 30, 30]
    assert cut_packed(widths, 200) == [slice(0, 4)]
    assert cut_packed(widths, 199) == [slice(0, 1), slice(1, 4)]
    assert cut_packed(widths, 100) == [slice(0, 1), slice(1, 4)]
    assert cut_packed(widths, 200, batch_size=3) == [slice(0, 1), slice(1, 4)]
    assert cut_packed([300, 20, 10], 100) == [slice(0, 1), slice(1, 3)]


@pytest.mark.parametrize("seed", range(8))
def test_a_packed_cut_has_as_few_micro_batches_as_there_can_be(seed: int) -> None:
    widths = np.sort(np.random.default_rng(seed).integers(1, 512, 64))[::-1]
    for max_tokens in (600, 2048, 4096):
        cuts = cut(widths, MicroBatchLimits(max_tokens, None, overhead=64, packed=True))
        sizes = [int(widths[rows].sum()) for rows in cuts]
        fewest, room = 0, 0  # filled one after the other, which is the least for runs
        for width in widths.tolist():
            fewest, room = (fewest, room - width) if width <= room else (fewest + 1, max_tokens - width)
        assert len(cuts) == fewest and max(sizes) <= max_tokens and sum(sizes) == widths.sum()
        assert max(sizes) <= 1.1 * sum(sizes) / len(sizes) + widths.max()
