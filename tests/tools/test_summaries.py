"""A second task through the same scripts: summaries become instructions; ROUGE-1, -2 and -L come out."""

import json
from pathlib import Path

import datasets
import pytest

import evaluate
from pocl.cli.flags import parse
from pocl.data.sources import read_instructions
from pocl.evaluation.sets import load_set
from tests.runs import call, read_jsonl
from tests.scripts.test_scripts import printed
from tests.tiny import save_model, tiny_model, tiny_tokenizer
from tools import fetch_summaries, make_tables, process_data


def write_splits(folder: Path, counts: dict[str, int], columns: tuple[str, str] = ("dialogue", "summary")) -> Path:
    """SAMSum-like files: a dialogue of as many lines as its number, and a summary."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        rows = [
            {columns[0]: "\n".join([f"Amy: line {j}." for j in range(i + 1)]), columns[1]: f" {split} {i} \n", "id": i}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_dev_comes_first_and_test_is_what_is_evaluated(tmp_path: Path) -> None:
    source = write_splits(tmp_path / "files", {"train": 6, "validation": 4, "test": 3})
    arguments = ["--set", "samsum", "--source", source, "--data-root", tmp_path / "data", "--num-dev", 2]
    result = call(fetch_summaries, [*arguments, "--num-train", 5, "--max-words", 7])
    assert result.status == 0, result.output
    assert "5 records to train on, 2 for dev, 3 to test on" in result.output
    records = read_instructions(tmp_path / "data" / "samsum" / "raw.jsonl")
    assert [record["output"] for record in records] == [f"validation {i}" for i in (0, 1)] + [
        f"train {i}" for i in range(5)
    ]
    assert records[-1]["input"] == "Amy: line 0.\nAmy: line 1.\nAmy:"  # seven words, with their line breaks
    examples = load_set(tmp_path / "data", "samsum")
    assert [example.references for example in examples] == [(f"test {i}",) for i in range(3)]
    assert "Summarize the following dialogue." in examples[0].prompt


def test_the_scripts_take_the_number_of_dev_records_that_was_fetched_and_evaluate_on_the_set(tmp_path: Path) -> None:
    source = write_splits(tmp_path / "files", {"train": 6, "validation": 4, "test": 3})
    arguments = ["--set", "samsum", "--source", source, "--data-root", tmp_path / "data"]
    result = call(fetch_summaries, [*arguments, "--num-dev", 2])
    assert result.status == 0, result.output
    assert result.last_line == "next: DATA=samsum bash scripts/<family>/tools/process_data.sh"
    command = printed("gpt2/tools/process_data.sh", tmp_path, cwd=tmp_path, DATA="samsum")
    (what,) = parse([process_data.ProcessOptions], "", command.arguments)
    assert (what.raw, what.num_dev) == (str(tmp_path / "data" / "samsum" / "raw.jsonl"), 2)
    asked = printed("gpt2/eval/run_eval.sh", tmp_path, cwd=tmp_path, DATA="samsum").arguments
    assert asked[asked.index("--sets") + 1 :][:2] == ["samsum", "--data-root"]


@pytest.mark.parametrize("name", fetch_summaries.SETS)
def test_every_set_names_its_columns(name: str, tmp_path: Path) -> None:
    source = fetch_summaries.SETS[name]
    files = write_splits(tmp_path / "f", {"train": 2, "validation": 1, "test": 1}, (source.text, source.summary))
    result = call(fetch_summaries, ["--set", name, "--source", files, "--data-root", tmp_path])
    assert result.status == 0, result.output
    assert read_jsonl(tmp_path / name / "raw.jsonl")[0]["instruction"] == source.instruction


def test_a_set_is_processed_answered_and_scored_like_any_other(tmp_path: Path) -> None:
    source = write_splits(tmp_path / "files", {"train": 4, "validation": 2, "test": 2})
    assert call(fetch_summaries, ["--set", "samsum", "--source", source, "--data-root", tmp_path / "data"]).status == 0
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer), end_id=tokenizer.eos_token_id)
    folder = save_model(model, tokenizer, tmp_path / "model")
    raw = tmp_path / "data" / "samsum" / "raw.jsonl"
    arguments = ["--raw", raw, "--tokenizer", folder, "--output-dir", tmp_path / "processed", "--num-dev", 2]
    assert call(process_data, [*arguments, "--num-workers", 1, "--data-root", tmp_path / "data"]).status == 0
    arguments = ["--model", folder, "--sets", "samsum", "--data-root", tmp_path / "data", "--seeds", 1, 2]
    result = call(evaluate, [*arguments, "--output-dir", tmp_path / "eval", "--max-length", 264])
    assert result.status == 0, result.output
    table = ["--rows", f"tiny={tmp_path / 'eval'}", "--metrics", "rouge_1", "rouge_2", "rouge_l"]
    result = call(make_tables, [*table, "--output", tmp_path / "t.csv"])
    assert result.status == 0, result.output
    assert [line.split(",")[2] for line in (tmp_path / "t.csv").read_text().splitlines()[1:]] == [
        "rouge_1",
        "rouge_2",
        "rouge_l",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "samsun"], ["did you mean 'samsum'"]),
        (["--set", "samsum", "--num-dev", 0], ["--num-dev is 0"]),
        (["--set", "samsum", "--source", "/nowhere"], ["/nowhere is no folder"]),
        (["--set", "xsum", "--source", "{files}"], ["no column document"]),
        (["--set", "samsum", "--source", "{empty}"], ["cannot load"]),
        (["--set", "samsum", "--source", "{untested}"], ["no split 'test'"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[object], words: list[str], tmp_path: Path) -> None:
    places = {"files": write_splits(tmp_path / "files", {"train": 1, "validation": 1, "test": 1})}
    places["untested"] = write_splits(tmp_path / "untested", {"train": 1, "validation": 1})
    places["empty"] = tmp_path / "empty"
    places["empty"].mkdir()
    filled = [str(argument).format(**places) for argument in arguments]
    result = call(fetch_summaries, [*filled, "--data-root", tmp_path / "data"])
    assert result.status == 2, result.output
    assert all(word in result.last_line for word in words), result.output
    assert not (tmp_path / "data").exists()


def test_an_empty_summary_is_left_out(tmp_path: Path) -> None:
    files = write_splits(tmp_path / "files", {"train": 2, "validation": 1, "test": 1})
    with open(files / "train.jsonl", "a") as file:
        file.write('{"dialogue": "a", "summary": "  ", "id": 9}\n')
    assert call(fetch_summaries, ["--set", "samsum", "--source", files, "--data-root", tmp_path]).status == 0
    assert len(read_jsonl(tmp_path / "samsum" / "raw.jsonl")) == 3


def test_a_set_whose_main_branch_is_a_script_comes_from_the_hubs_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch holds default/<split>/0000.parquet; the hub itself is not asked here."""
    asked, load = [], datasets.load_dataset
    for split in ("train", "validation", "test"):
        rows = datasets.Dataset.from_dict({"document": [f"{split} text"], "summary": [f"{split} summary"]})
        (tmp_path / "branch" / "default" / split).mkdir(parents=True)
        rows.to_parquet(tmp_path / "branch" / "default" / split / "0000.parquet")

    def hub(repo: str, name: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.append((repo, name, revision))
        return load(str(tmp_path / "branch"))

    monkeypatch.setattr(fetch_summaries.datasets, "load_dataset", hub)
    result = call(fetch_summaries, ["--set", "xsum", "--data-root", tmp_path / "data"])
    assert result.status == 0, result.output
    assert asked == [("EdinburghNLP/xsum", None, "refs/convert/parquet")]
    outputs = [record["output"] for record in read_instructions(tmp_path / "data" / "xsum" / "raw.jsonl")]
    assert outputs == ["validation summary", "train summary"]
