"""A field of a model folder that a library stumbles over gives one line that names file and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from pocl.common.errors import UserError, first_line
from pocl.models.student import Student
from tests.tiny import save_model, tiny_model, tiny_tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
WRONG: list[tuple[str, str, Any]] = [
    (CONFIG, "pad_token_id", 700),
    (CONFIG, "pad_token_id", "<pad>"),
    (CONFIG, "eos_token_id", "</s>"),
    (CONFIG, "dtype", "auto"),
    (CONFIG, "torch_dtype", "float99"),
    (CONFIG, "vocab_size", "600"),
    (CONFIG, "hidden_act", "nothing"),
    (GENERATION, "eos_token_id", "</s>"),
    (GENERATION, "eos_token_id", [0, "</s>"]),
    (GENERATION, "eos_token_id", 2.0),
    (GENERATION, "eos_token_id", True),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny llama."""
    return save_model(tiny_model("llama", vocab_size=600, end_id=0), tiny_tokenizer(), tmp_path)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(("name", "field", "value"), WRONG)
def test_the_line_names_file_and_field(folder: Path, name: str, field: str, value: Any) -> None:
    change(folder / name, **{field: value})
    with pytest.raises(UserError) as refused:
        Student.load(str(folder)).end_ids  # noqa: B018
    line = str(refused.value)
    assert "\n" not in line and field in line and str(folder / name) in line and "no tokenizer" not in line


@pytest.mark.parametrize("values", [{"num_attention_heads": 0}, {"num_attention_heads": 5}, {"layer_types": ["x"]}])
def test_other_settings_that_no_model_has_are_one_line(folder: Path, values: dict[str, Any]) -> None:
    change(folder / CONFIG, **values)
    with pytest.raises(UserError) as refused:
        Student.load(str(folder))
    assert "\n" not in str(refused.value)


def test_what_transformers_reads_is_read(folder: Path) -> None:
    change(folder / CONFIG, pad_token_id=-1, dtype="float32")
    change(folder / GENERATION, eos_token_id=[7, 0], pad_token_id=None)
    assert Student.load(str(folder)).end_ids == [0, 7]


def test_a_tokenizer_model_without_sentencepiece_names_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x07no model")
    monkeypatch.setattr("pocl.models.loading.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package sentencepiece; pip install sentencepiece"):
        Student.load(str(folder))


def test_a_librarys_reason_is_kept_where_it_stands_in_the_second_line() -> None:
    assert first_line(RuntimeError("Error(s) for X:\n\tsize mismatch for w\n\tmore")) == (
        "Error(s) for X: size mismatch for w"
    )
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(ValueError()) == "ValueError"
