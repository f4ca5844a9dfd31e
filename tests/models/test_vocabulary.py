"""Tokenizers and models of one family that differ a little: ids left out, more tokens than rows, other end tokens."""

import json
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import evaluate
import train
from pocl.common.errors import UserError
from pocl.models.identity import check_same_tokenizer, used_vocabulary, vocabulary_size
from pocl.models.loading import load_model
from pocl.models.student import Student
from tests.runs import MAX_LENGTH, MAX_PROMPT, Folders, call, make_folders, train_arguments
from tests.tiny import END_OF_TEXT, save_model, tiny_model, tiny_tokenizer
from tools import generate_seqkd, process_data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair and data."""
    return make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")


def with_token(name: str, number: int) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one more token, of this id."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    token = {"id": number, "content": name, "special": True, "normalized": False}
    state["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    state["model"]["vocab"][name] = number
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END_OF_TEXT)


def instruct() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with two tokens of a chat, of which one ends texts."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def model_of(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path, *, seed: int = 0) -> Path:
    model = tiny_model("gpt2", vocab_size=rows, end_id=0, seed=seed)
    return save_model(model, tokenizer, folder)


def test_the_vocabulary_reaches_to_the_highest_id_whatever_the_number_of_tokens(tmp_path: Path) -> None:
    sparse = with_token("<far>", 640)
    assert len(sparse) == 601 and vocabulary_size(sparse) == 641
    student = Student.load(str(model_of(sparse, 641, tmp_path)))
    assert student.head.num_logits == 641
    assert used_vocabulary(sparse, student.model, 620) == 620


def processed(folders: Folders, tokenizer: Path, place: Path, text: str = "") -> Path:
    """Data for this tokenizer, in which ``text`` stands once."""
    lines = (folders.data_root / "short" / "raw.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    records[-1]["output"] += text
    place.mkdir()
    (place / "raw.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["--raw", place / "raw.jsonl", "--tokenizer", tokenizer, "--output-dir", place / "made"]
    command += ["--num-dev", 8, "--max-prompt-length", MAX_PROMPT, "--data-root", folders.data_root]
    result = call(process_data, command)
    assert result.status == 0, result.output
    return place / "made"


SHORT = ("--num-stages", 1, "--num-train", 16, "--num-dev", 2)


@pytest.mark.parametrize("number", [600, 640])
def test_a_model_without_rows_for_ids_that_no_text_uses_is_trained_and_answers(
    folders: Folders, tmp_path: Path, number: int
) -> None:
    student = model_of(with_token("<image>", number), 600, tmp_path / "student")
    teacher = model_of(with_token("<image>", number), 600, tmp_path / "teacher", seed=1)
    data = processed(folders, student, tmp_path / "data", " <image>")  # a special token's name is text
    arguments = train_arguments(folders, tmp_path / "out", *SHORT, "--model", student, "--teacher", teacher)
    result = call(train, [*arguments, "--data-dir", data])
    assert result.status == 0, result.output
    best = tmp_path / "out" / "tfkl" / "seed10" / "best"
    limits = ["--max-length", MAX_LENGTH, "--max-prompt-length", MAX_PROMPT, "--seeds", 1]
    result = call(evaluate, ["--model", best, "--sets", "short", "--data-root", folders.data_root, *limits])
    assert result.status == 0, result.output


@pytest.mark.parametrize("plan", [[], ["--plan"]])
def test_an_id_of_a_text_that_a_model_has_no_row_for_is_refused_with_the_resize_before_anything_is_loaded(
    folders: Folders, tmp_path: Path, plan: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocl.models.student.load_model", None)
    small = tiny_tokenizer()
    teacher = model_of(small, 590, tmp_path / "teacher", seed=1)
    result = call(train, [*train_arguments(folders, tmp_path / "out", *SHORT, "--teacher", teacher), *plan])
    assert result.status == 2, result.output
    assert (
        f"but {str(teacher)!r} has 590 vocabulary entries; resize it: resize_token_embeddings(600)" in result.last_line
    )
    assert not (tmp_path / "out").exists()


def test_evaluation_and_seqkd_name_the_resize_before_anything_is_loaded_too(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for program in (evaluate, generate_seqkd):
        monkeypatch.setattr(program, "load_model", None)
    model = model_of(tiny_tokenizer(), 400, tmp_path / "small")
    limits = ["--max-length", MAX_LENGTH, "--output-dir", tmp_path / "out", "--model", model]
    sets = ["--sets", "short", "--data-root", folders.data_root, "--max-prompt-length", MAX_PROMPT]
    for program, more in ((evaluate, sets), (generate_seqkd, ["--data-dir", folders.data])):
        result = call(program, [*limits, *more])
        assert result.status == 2 and "resize_token_embeddings(" in result.last_line, result.output


# Base and instruct


def test_tokenizers_that_differ_in_special_tokens_alone_fit(
    folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    instruct().save_pretrained(tmp_path)
    with caplog.at_level("INFO", logger="pocl"):
        check_same_tokenizer("base", str(tmp_path), tiny_tokenizer())
    assert "the student's <|endoftext|> is trained" in caplog.text


def test_the_first_tokens_that_differ_are_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (300, 301)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as refused:
        check_same_tokenizer("student", str(tmp_path), tokenizer)
    assert "(2 tokens differ: " in str(refused.value)
    assert all(f"{token!r} is " in str(refused.value) for token in (first, second))


def test_an_instruct_teacher_teaches_a_base_student_whose_end_is_trained(folders: Folders, tmp_path: Path) -> None:
    teacher = model_of(instruct(), 602, tmp_path / "teacher", seed=1)
    result = call(train, train_arguments(folders, tmp_path / "out", *SHORT, "--teacher", teacher))
    assert result.status == 0, result.output
    said = " ".join(result.output.split())
    assert f"the teacher {teacher} with <|im_end|>: the student's {END_OF_TEXT} is trained" in said
    assert load_model(str(tmp_path / "out" / "tfkl" / "seed10" / "best")).config.vocab_size == 600


def test_an_instruct_teachers_answers_end_with_the_end_of_the_data(folders: Folders, tmp_path: Path) -> None:
    teacher = model_of(instruct(), 602, tmp_path / "teacher", seed=1)
    command = ["--model", teacher, "--data-dir", folders.data, "--max-length", MAX_LENGTH]
    result = call(generate_seqkd, [*command, "--output-dir", tmp_path / "out", "--seed", 3])
    assert result.status == 0, result.output

    rows = datasets.load_from_disk(str(tmp_path / "out" / "train"))["response_ids"]
    ended = [ids for ids in rows if len(ids) < MAX_LENGTH - MAX_PROMPT]
    assert all(ids[-1] == 0 and 601 not in ids for ids in ended)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (
        manifest["tokenizer_fingerprint"]
        == json.loads((folders.data / "manifest.json").read_text())["tokenizer_fingerprint"]
    )
