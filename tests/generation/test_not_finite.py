"""No token is chosen from logits that are not finite: every command that answers says so, and none writes answers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import evaluate
import train
from pocl.generation.sampling import can_choose
from tests.runs import MAX_LENGTH, MAX_PROMPT, Folders, call, make_folders, train_arguments
from tools import generate_seqkd


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair whose student has one weight that is NaN."""
    folders = make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folders.student)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    model.save_pretrained(folders.student)
    return folders


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_with_such_a_logit_is_told_from_one_that_masks_tokens(value: float) -> None:
    logits = torch.zeros(4, 5)
    logits[1, 2], logits[2, 1:], logits[3] = value, -torch.inf, -torch.inf
    assert can_choose(logits).tolist() == [True, False, True, False]


def commands(folders: Folders, place: Path) -> dict[str, tuple[object, list[object]]]:
    """The commands that answer prompts."""
    limits = ["--max-length", MAX_LENGTH, "--max-prompt-length", MAX_PROMPT]
    dev = ["--difficulty", "length", "--type", "sft", "--max-skipped-steps", 999]
    return {
        "evaluation": (
            evaluate,
            ["--model", folders.student, "--data-root", folders.data_root, "--sets", "short", *limits]
            + ["--output-dir", place],
        ),
        "SeqKD": (
            generate_seqkd,
            ["--model", folders.student, "--data-dir", folders.data, "--output-dir", place, *limits[:2]],
        ),
        "ranking": (train, train_arguments(folders, place)),
        "dev": (train, train_arguments(folders, place, *dev, teacher=False)),
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["evaluation", "SeqKD", "ranking", "dev"])
def test_a_nan_weight_ends_the_command_with_a_line_that_names_the_dtype(
    folders: Folders, tmp_path: Path, what: str, dtype: str
) -> None:
    program, arguments = commands(folders, tmp_path / "out")[what]
    result = call(program, [*arguments, "--dtype", dtype])
    assert result.status == 1 and "Traceback" not in result.output, result.output
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    assert f"not finite (NaN or infinite) in {name}" in result.last_line, result.output
    assert result.last_line.endswith("check the weights, or give another --dtype")
    written = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    results = {"10.jsonl", "summary.json", "manifest.json", "model.safetensors"}
    assert not (results if what == "dev" else results | {"difficulty.jsonl"}) & {*written}
