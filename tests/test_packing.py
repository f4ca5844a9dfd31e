"""Packed micro-batches: the same objective, gradients and curves as padded ones, refused where a model mixes them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import train
from pocl.batching import cut_rows
from pocl.data import collate
from pocl.losses import LOSSES
from pocl.models import keeps_apart, make_head, response_states
from pocl.objective import StudentObjective, Term
from tests.runs import Folders, call, make_folders, read_jsonl, train_arguments
from tests.tiny import tiny_model

CPU = torch.device("cpu")
PACKING = ("gpt2", "llama", "qwen2")  # OPT takes no notice of positions in its mask
PROMPTS = [[5, 9, 200, 31], [77, 12], [300, 4, 4, 8, 16, 15, 23, 42], [598]]
RESPONSES = [[10, 11, 12, 0], [13, 0], [599, 51, 52, *range(100, 115), 0], [14, 0, 15, 16, 17, 0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("packing"), "gpt2")


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKING)
def test_packed_states_objective_and_gradients_are_the_padded_ones(family: str, attention: str) -> None:
    student = tiny_model(family, vocab_size=600, end_id=0).double()
    student.set_attn_implementation(attention)
    teacher = tiny_model(family, vocab_size=600, end_id=0, num_layers=3).double()
    assert keeps_apart(student, CPU) and keeps_apart(teacher, CPU)
    term = Term(LOSSES["tjsd"].bind(), 1.5, 2.25, 0.7)
    ratio = torch.tensor([0.2, 1.0, 0.5, 0.0], dtype=torch.float64)
    padded = collate(range(4), PROMPTS, RESPONSES, max_length=24)
    found = []
    for batch in (padded, padded.packed()):
        model: PreTrainedModel = copy.deepcopy(student)
        with torch.no_grad():
            states = response_states(teacher, batch)
        parts = StudentObjective(model, chunk_tokens=10)(batch, term, states, make_head(teacher), ratio)
        parts[0].backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        found.append([*parts, states, *gradients])
    assert len(found[0]) > 10
    tolerance = 1e-9 if attention == "sdpa" else 1e-6  # eager takes its softmax in float32
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance / 100)


def test_a_model_that_mixes_packed_examples_is_found_out() -> None:
    assert not keeps_apart(tiny_model("opt", vocab_size=600, end_id=0), CPU)
    mixing = tiny_model("llama", vocab_size=600, end_id=0)
    forward = mixing.base_model.forward
    mixing.base_model.forward = lambda input_ids, position_ids=None, **others: forward(input_ids, **others)
    assert not keeps_apart(mixing, CPU)


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
        flags = [*extra, "--packing", packing, "--num-dev", 0]
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


def test_packing_that_a_model_cannot_do_is_refused(tmp_path: Path) -> None:
    folders = make_folders(tmp_path / "opt", "opt")
    result = call(train, train_arguments(folders, tmp_path / "out", "--packing", "on", "--num-dev", 0))
    assert result.status == 2
    assert "the student (opt) does not keep packed examples apart" in result.last_line
    assert "give --packing off" in result.last_line and not (tmp_path / "out" / "tfkl" / "seed10").exists()


def test_an_attention_that_is_not_there_is_refused(folders: Folders, tmp_path: Path) -> None:
    flags = ["--attention", "flash_attention_2", "--num-dev", 0]
    result = call(train, train_arguments(folders, tmp_path / "out", *flags))
    assert result.status == 2 and "cannot load a model from" in result.last_line
    assert not (tmp_path / "out").exists()


def test_a_packed_cut_counts_no_padding() -> None:
    widths = np.array([100, 40, 30, 30])
    assert cut_rows(widths, max_tokens=200, overhead=5, packed=True) == [slice(0, 4)]
    assert cut_rows(widths, max_tokens=100, overhead=5, packed=True) == [slice(0, 1), slice(1, 4)]
    assert cut_rows(widths, max_tokens=200, batch_size=3, overhead=5, packed=True) in (
        [slice(0, 1), slice(1, 4)],
        [slice(0, 2), slice(2, 4)],
        [slice(0, 3), slice(3, 4)],
    )
