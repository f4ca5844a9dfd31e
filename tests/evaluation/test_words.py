"""What ROUGE takes for words, and texts that it cannot read."""

import json
from pathlib import Path

import pytest

import evaluate
import train
from pocl.common.errors import UserError
from pocl.curriculum.stages import Stage
from pocl.evaluation.answers import score_answers
from pocl.evaluation.metrics import METRICS, rouge_l
from pocl.evaluation.sets import Example, load_set
from pocl.evaluation.words import check_readable, words
from pocl.training.position import DevScores, Position, after_epoch
from tests.runs import Folders, call, make_folders, train_arguments
from tools import process_data

SCRIPTS = {
    "Chinese": ("北京上海", ["北", "京", "上", "海"]),
    "Thai": ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
    "Lao": ("ລາວ", ["ລ", "າ", "ວ"]),
    "Khmer": ("ភាសា", ["ភា", "សា"]),
    "Myanmar": ("မြန်မာ", ["မြ", "န်", "မာ"]),
    "Arabic": ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
    "Russian": ("Привет, МИР!", ["привет", "мир"]),
    "Korean": ("한국어 말", ["한국어", "말"]),
    "emoji": ("😀👍🏽 👨‍👩‍👧", ["😀", "👍🏽", "👨‍👩‍👧"]),
    "English": ("The dogs ran, didn't they?", ["the", "dog", "ran", "didn't", "they"]),
    "signs alone": ("?!", ["?", "!"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair and data."""
    return make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unicode_words_are_those_counted_by_hand(script: str) -> None:
    text, wanted = SCRIPTS[script]
    assert list(words(text, "unicode")) == wanted


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_identical_answer_has_every_score_in_every_script(script: str) -> None:
    text, wanted = SCRIPTS[script]
    (record,) = score_answers([Example(0, "?", (text,))], [text], "unicode")
    scores = {name: record[name] for name in METRICS}
    assert scores == {name: 100.0 if name != "rouge_2" or len(wanted) > 1 else 0.0 for name in METRICS}


def test_half_of_a_chinese_answer_has_two_thirds_of_rouge_l() -> None:
    assert rouge_l("北京", ["北京上海"], "unicode") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert rouge_l("北京", ["北京上海"]) == 0.0


def test_composed_and_decomposed_letters_are_the_same_word() -> None:
    assert words("caf\u00e9", "unicode") == words("cafe\u0301", "unicode")


@pytest.mark.parametrize("unread", ["北京上海", "我有3个苹果和5个梨", "Привет от Bob, как дела сегодня", "!?"])
def test_more_than_a_tenth_of_unreadable_references_is_refused_with_the_flag_that_mends_it(unread: str) -> None:
    check_readable(["readable"] * 9 + [unread], "rouge", "the set")
    check_readable([unread] * 9, "unicode", "the set")
    with pytest.raises(UserError, match=r"2 of 10 references of the set .*`rouge_tokenizer` unicode"):
        check_readable(["readable"] * 8 + [unread] * 2, "rouge", "the set")


def test_evaluate_refuses_what_rouge_cannot_read_and_scores_it_by_unicodes_words(tmp_path: Path) -> None:
    (tmp_path / "zh").mkdir()
    record = {"instruction": "请写山水", "output": "北京上海"}
    (tmp_path / "zh" / "valid.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "answers.jsonl").write_text(json.dumps({"text": "北京上海"}) + "\n")
    command = ["--answers", tmp_path / "answers.jsonl", "--sets", "zh", "--data-root", tmp_path]
    refused = call(evaluate, command)
    assert refused.status == 2 and refused.last_line.endswith("give --rouge-tokenizer unicode"), refused.output
    result = call(evaluate, [*command, "--rouge-tokenizer", "unicode", "--output-dir", tmp_path / "eval"])
    assert result.status == 0, result.output
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["zh"]["rouge_l"]["mean"] == 100.0


def test_training_on_chinese_is_refused_before_anything_is_written_and_goes_on_with_the_flag(
    folders: Folders, tmp_path: Path
) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text((json.dumps({"instruction": "请写山水", "output": "北京上海"}) + "\n") * 24)
    made = ["--raw", raw, "--tokenizer", folders.student, "--output-dir", tmp_path / "zh", "--num-dev", 8]
    assert call(process_data, [*made, "--data-root", tmp_path, "--max-prompt-length", 160]).status == 0
    command = train_arguments(folders, tmp_path / "out", "--type", "tfkl", "--num-stages", 2, "--epochs", 2)
    command[command.index("--data-dir") + 1] = str(tmp_path / "zh")
    refused = call(train, command)
    assert refused.status == 2 and "--rouge-tokenizer unicode" in refused.last_line, refused.output
    assert not (tmp_path / "out").exists()
    result = call(train, [*command, "--rouge-tokenizer", "unicode", "--max-length", 192])
    assert result.status == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "tfkl" / "seed10" / "metrics.jsonl").open()]
    dev = [(line["dev_rouge_l"], -line["dev_cross_entropy"]) for line in lines if "dev_rouge_l" in line]
    assert len(dev) == 4
    config = json.loads((tmp_path / "out" / "tfkl" / "seed10" / "config.json").read_text())
    assert config["options"]["generation"]["rouge_tokenizer"] == "unicode"


# The ceiling of a ban


def test_references_that_a_ban_makes_impossible_are_counted_and_said(folders: Folders, tmp_path: Path) -> None:
    place = tmp_path / "data" / "repeats"
    place.mkdir(parents=True)
    prompt = "one two three four five six seven eight nine ten "
    outputs = ["eleven", "a b c", prompt, "x y z x y z x y z x y z x y z x y z"]
    records = [{"prompt": prompt, "output": output} for output in outputs]
    (place / "valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["--model", folders.student, "--sets", "repeats", "--data-root", tmp_path / "data", "--seeds", 1]
    command += ["--max-length", 192, "--max-prompt-length", 160]
    said = call(evaluate, [*command, "--output-dir", tmp_path / "banned"]).output
    assert "repeats: 2 of 4 references cannot be written under --no-repeat-ngram 6" in said
    said = call(evaluate, [*command, "--output-dir", tmp_path / "free", "--no-repeat-ngram", 0]).output
    assert "references cannot be written" not in said


def test_a_null_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "valid.jsonl").write_text('{"instruction": "Say hi.", "input": null, "output": "Hi."}\n')
    with pytest.raises(UserError, match="valid.jsonl:1: 'input' is null; it must be a string"):
        load_set(tmp_path, "set")


# The best student


def best_of(scores: list[tuple[float, float]]) -> int:
    """Which of these dev evaluations is kept."""
    stage, position, best = Stage(0, range(8), len(scores), 1.0, 1.0), Position(), -1
    for number, score in enumerate(scores):
        end = after_epoch(position, stage, DevScores(*score), patience=None, last_stage=True)
        position = end.position
        if end.is_best:
            best, position = number, position.with_best(DevScores(*score))
    return best


def test_on_equal_dev_rouge_l_the_lower_cross_entropy_is_kept() -> None:
    assert best_of([(0.0, 6.0), (0.0, 5.0), (0.0, 5.5)]) == 1
    assert best_of([(20.0, 2.0), (20.0, 2.0)]) == 0  # the first of equals
    assert best_of([(20.0, 2.0), (21.0, 4.0), (20.0, 1.0)]) == 1
