"""The same records are the same tokens whatever form they come in, and a form that cannot be read is refused."""

import csv
import gzip
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

import pocl
from pocl.common.errors import UserError
from pocl.common.files import read_jsonl, write_jsonl
from pocl.data.encoding import Encoder
from pocl.data.processing import CHUNK, encode_stream
from pocl.data.sources import open_source
from pocl.data.templates import choose_template
from pocl.evaluation.sets import load_set
from tests.chat import chat_tokenizer
from tests.tiny import ROOT

RECORDS = read_jsonl(ROOT / "data" / "sample" / "raw.jsonl")[:200]
NAMES = ("instruction", "input", "output")
GOOD = {"instruction": "Add.", "input": "1 2", "output": "3"}


def said(record: dict[str, Any]) -> str:
    return record["instruction"] + (f"\n\n{record['input']}" if record["input"] else "")


def write_csv(path: Path, records: list[dict[str, Any]], delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def written(folder: Path, form: str) -> Any:
    """The 200 records in one form."""
    plain = [{name: record[name] for name in NAMES} for record in RECORDS]
    dolly = [dict(zip(("instruction", "context", "response"), record.values(), strict=True)) for record in plain]
    asked = [{"question": said(record), "answer": record["output"]} for record in plain]
    openai = [
        {"messages": [{"role": "user", "content": said(r)}, {"role": "assistant", "content": r["output"]}]}
        for r in plain
    ]
    shared = [
        {"conversations": [{"from": "human", "value": said(r)}, {"from": "gpt", "value": r["output"]}]} for r in plain
    ]
    lines = {"jsonl": plain, "dolly": dolly, "asked": asked, "messages": openai, "sharegpt": shared}
    if form in lines:
        write_jsonl(folder / "raw.jsonl", lines[form])
        return folder / "raw.jsonl"
    if form == "prompt.tsv":
        rows = [{"prompt": row["question"], "completion": row["answer"]} for row in asked]
        write_csv(folder / form, rows, "\t")
    elif form == "array.json.gz":
        (folder / form).write_bytes(gzip.compress(json.dumps(plain, indent=1).encode()))
    elif form == "raw.csv":
        write_csv(folder / form, plain)
    elif form == "messages.csv":
        write_csv(folder / form, [{"messages": json.dumps(row["messages"])} for row in openai])
    elif form == "messages.parquet":
        datasets.Dataset.from_list(openai).to_parquet(str(folder / form))
    elif form == "raw.parquet":
        datasets.Dataset.from_list(plain).to_parquet(str(folder / form))
    elif form == "Dataset":
        return datasets.Dataset.from_list(openai)
    elif form == "saved":
        datasets.Dataset.from_list(plain).save_to_disk(str(folder / form))
    elif form == "parts":
        write_jsonl(folder / form / "1.jsonl", plain[:50])
        write_jsonl(folder / form / "2.jsonl", plain[50:])
    elif form == "hub":
        write_jsonl(folder / form / "train.jsonl", plain)
        return f"hub:{folder / form}"
    else:
        return plain
    return folder / form


FORMS = ["dolly", "asked", "messages", "sharegpt", "prompt.tsv", "array.json.gz", "raw.csv", "messages.csv"]
FORMS += ["messages.parquet", "raw.parquet", "Dataset", "saved", "parts", "hub", "in memory"]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[int], list[int]]]:
    """The tokens of the 200 records given as JSON lines."""
    return tokens(written(tmp_path_factory.mktemp("jsonl"), "jsonl"))


def tokens(source: Any) -> list[tuple[list[int], list[int]]]:
    split = pocl.encode(pocl.load_records(source), chat_tokenizer("smollm2"), max_prompt_length=10_000)
    return list(zip(split.column("prompt_ids"), split.column("response_ids"), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_the_same_records_in_any_form_are_the_same_tokens(
    wanted: list[tuple[list[int], list[int]]], tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(wanted) == 200
    assert tokens(written(tmp_path, form)) == wanted


def refused(source: Any, columns: Any = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        pocl.load_records(source, columns, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_columns_are_named_where_their_names_do_not_say_it(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "Add.", "numbers": "1 2", "answer": "3", "gold": "4", "category": 5}]
    with caplog.at_level("INFO", "pocl"):
        (found,) = pocl.load_records(rows)
    assert (found["instruction"], found["output"], found["category"]) == ("Add.", "3", "5")
    assert "instruction is 'question'" in caplog.text and "output is 'answer'" in caplog.text
    (found,) = pocl.load_records(rows, ["instruction=question", "input=numbers", "output=gold"])
    assert {name: found[name] for name in NAMES} == GOOD | {"output": "4"}
    (found,) = pocl.load_records(rows, {"prompt": "question", "output": "gold"})
    assert (found["prompt"], found["output"]) == ("Add.", "4")


COLUMNS: dict[str, tuple[dict[str, Any], list[str] | None, str]] = {
    "two ways": (
        GOOD | {"question": "a", "answer": "b"},
        None,
        "in two ways, by instruction and output or question and",
    ),
    "two inputs": (GOOD | {"context": "c"}, None, "in two ways, by input or context"),
    "none": ({"text": "a", "label": "b"}, None, r"its columns \(text, label\) are none of"),
    "missing": (GOOD, ["instruction=instructions", "output=output"], "no column 'instructions'; did you mean 'instr"),
    "a field that there is not": (
        GOOD,
        ["instructon=instruction"],
        "no field 'instructon'; did you mean 'instruction'",
    ),
    "a field twice": (GOOD, ["output=output", "output=input"], "output is named twice"),
    "a column twice": (GOOD, ["instruction=output", "output=output"], "column 'output' is read twice"),
    "no pair": (GOOD, ["instruction"], "holds 'instruction'; each wants to be FIELD=COLUMN"),
    "half": (GOOD, ["instruction=instruction"], "wants instruction and output"),
    "an empty answer": ({"question": "a", "answer": " "}, None, "record 1: 'answer' is empty"),
}


@pytest.mark.parametrize("what", COLUMNS)
def test_columns_that_do_not_say_what_they_are_are_refused(what: str) -> None:
    import re

    row, columns, complaint = COLUMNS[what]
    assert re.search(complaint, refused([row], columns))


def test_a_row_that_a_table_tears_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    for text, complaint in {
        'instruction,output\na,b\n"two\nlines",c\nd,e,f\n': f"{path}:5: the row that ends here has 3 cells",
        "instruction,output\na\n": f"{path}:2: the row that ends here has 1 cells",
        'instruction,output\na,"b\n': "no valid CSV",
        "instruction,instruction\na,b\n": "two columns are called 'instruction'",
        "": "is empty",
        "instruction,output\n": "holds no record",
    }.items():
        path.write_text(text)
        assert complaint in refused(path)
    path.write_bytes("instruction,output\ncafé,b\n".encode("latin-1"))
    assert "no UTF-8" in refused(path)


def test_a_source_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "mixed" / "a.jsonl", [GOOD])
    write_csv(tmp_path / "mixed" / "b.csv", [GOOD])
    assert "files of several kinds (.csv, .jsonl); give one file" in refused(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    assert "holds none of .jsonl" in refused(tmp_path / "empty")
    assert "does not exist" in refused(tmp_path / "nowhere.csv")
    for name in ("bad.parquet", "bad.jsonl.gz"):
        (tmp_path / name).write_bytes(b"no such thing")
        assert f"{tmp_path / name}" in refused(tmp_path / name)
    (tmp_path / "array.json").write_text('[{"instruction": "a"}, 3]')
    assert "array.json, record 1: no field 'output'" in refused(tmp_path / "array.json")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "dict"))
    assert "has no split 'train'; it has test" in refused(tmp_path / "dict")
    assert len(pocl.load_records(tmp_path / "dict", split="test")) == 1
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refused("hub:nobody/nothing@main")
    assert "hub:nobody/nothing@main could not be loaded" in message and "download it where there is a" in message


def test_an_evaluation_set_takes_the_same_forms_and_several_references(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("lines", "cells", "talk", "text")}
    for folder in folders.values():
        folder.mkdir()
    references = ["3", "three"]
    write_jsonl(folders["lines"] / "valid.jsonl", [GOOD | {"output": references}])
    write_csv(folders["cells"] / "valid.csv", [GOOD | {"output": json.dumps(references)}])
    write_jsonl(folders["text"] / "valid.jsonl", [{"prompt": "As it stands", "output": "[1, 2]"}])
    talk = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    write_jsonl(folders["talk"] / "valid.jsonl", [{"messages": talk}])
    tokenizer = chat_tokenizer("llama3")
    encoder = Encoder(tokenizer, choose_template(tokenizer))
    found = {name: load_set(tmp_path, name, encoder=encoder)[0] for name in folders}
    assert found["lines"].references == found["cells"].references == ("3", "three")
    assert found["talk"].references == ("3",) and found["text"].references == ("[1, 2]",)
    assert found["lines"].prompt_ids == found["cells"].prompt_ids == found["talk"].prompt_ids
    assert tokenizer.decode(found["lines"].prompt_ids) == found["lines"].prompt
    assert load_set(tmp_path, "text")[0].prompt == "As it stands"
    write_csv(folders["lines"] / "valid.csv", [GOOD])
    with pytest.raises(UserError, match="holds valid.jsonl and valid.csv; keep one"):
        load_set(tmp_path, "lines")


def test_processes_keep_the_order_and_read_no_further_than_they_must() -> None:
    tokenizer, taken = chat_tokenizer("smollm2"), [0]

    def endless() -> Iterator[dict[str, Any]]:
        while True:
            taken[0] += 1
            yield {"instruction": f"Say {taken[0]}.", "output": str(taken[0])}

    chunks = encode_stream(endless(), Encoder(tokenizer, choose_template(tokenizer)), num_workers=2)
    found = [response for _ in range(6) for response in next(chunks).examples["response"].to_pylist()]
    chunks.close()  # type: ignore[attr-defined]
    assert found == [str(i) for i in range(1, 6 * CHUNK + 1)]
    assert taken[0] <= 16 * CHUNK
    assert not [process for process in multiprocessing.active_children() if process.name.startswith("Fork")]


def test_the_digest_of_a_source_is_that_of_its_bytes_or_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [GOOD])
    rows = [open_source([GOOD]).sha256(), open_source([GOOD | {"output": "4"}]).sha256()]
    assert open_source(tmp_path / "a.jsonl").sha256() not in rows and rows[0] != rows[1]
