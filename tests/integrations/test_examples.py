"""The examples run on a tiny pair, and each is readable at one sitting; `pocl.rank` reads what they rank."""

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import datasets
import pytest
import torch
from safetensors.torch import load_file

import pocl
from tests.ranks import on_ranks
from tests.runs import Folders
from tests.tiny import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
NUM_RECORDS = 32


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short prompts and completions."""
    lines = (ROOT / "data" / "sample" / "raw.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = sorted(lines, key=len)[:NUM_RECORDS]
    found = [(record["instruction"], record["output"]) for record in map(json.loads, chosen)]
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rows = [json.dumps({"prompt": f"{prompt}\n", "completion": completion}) for prompt, completion in found]
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def assert_trained(start: Path, end: Path) -> None:
    """Every matrix of the layers has changed."""
    before, after = (load_file(folder / "model.safetensors") for folder in (start, end))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before if "proj" in key)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "plain_loop"])
def test_an_example_trains_the_student(
    llama: Folders, records: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [llama.student] if name == "trl_sft" else [llama.student, llama.teacher]
    argv = [f"{name}.py", *map(str, [*models, records, tmp_path / "out"])]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with mock.patch.object(sys, "argv", argv):
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert_trained(llama.student, tmp_path / "out")


def test_the_plain_loop_trains_the_student_alike_on_one_process_and_two(
    llama: Folders, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    models = [str(llama.student), str(llama.teacher), str(records)]
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", *models, str(tmp_path / "one")])
    runpy.run_path(str(ROOT / "examples" / "plain_loop.py"), run_name="__main__")
    alone = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]
    result = on_ranks("tests/integrations/plain.py", [*models, tmp_path / "two"], num_ranks=2)
    assert result.status == 0, result.output
    together = [line for line in result.output.splitlines() if line.startswith("step ")]
    assert together == alone and len(alone) == 6
    assert_trained(llama.student, tmp_path / "one")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_readable_at_one_sitting(name: str) -> None:
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= (60 if name == "plain_loop" else 75)


def test_a_plain_data_set_is_ranked_under_its_own_ids(llama: Folders, records: Path) -> None:
    rows = datasets.load_dataset("json", data_files=str(records), split="train").select(range(12))
    named = rows.add_column("id", [f"row-{number}" for number in range(12)])
    student = pocl.Student.load(str(llama.student))
    ranking = pocl.rank(named, student, signals=["cross-entropy"])
    encoded = pocl.encode(pocl.load_records(rows), student.tokenizer)
    wanted = pocl.rank(encoded, student, signals=["cross-entropy"])
    assert [record["id"] for record in ranking.records] == [f"row-{record['id']}" for record in wanted.records]
    assert ranking.order.tolist() == wanted.order.tolist()
    assert pocl.rank(rows, student, signals=["cross-entropy"]).order.tolist() == wanted.order.tolist()
    with pytest.raises(pocl.UserError, match="`student` is None"):
        pocl.rank(named, None, signals=["length"])
