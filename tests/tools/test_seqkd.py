"""SeqKD: the teacher's answers are the targets, and nothing of the references is."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from pocl.data.dataset import load_split
from pocl.generation import decoding as generation
from tests.ranks import on_ranks
from tests.runs import MAX_LENGTH, Folders, call, read_jsonl, train_arguments
from tools import generate_seqkd, process_data

LONGEST = MAX_LENGTH - 160  # what the prompts leave


def arguments(folders: Folders, output_dir: Path, *extra: object) -> list[object]:
    command: list[object] = ["--model", folders.teacher, "--data-dir", folders.data, "--output-dir", output_dir]
    return [*command, "--max-length", MAX_LENGTH, "--eval-batch-size", 5, *extra]


@pytest.fixture(scope="module")
def made(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("made") / "seqkd"
    result = call(generate_seqkd, arguments(folders, output_dir))
    assert result.status == 0, result.output
    assert "48 answers" in result.last_line
    return output_dir


def rows(folder: Path, split: str = "train") -> list[dict[str, object]]:
    return list(datasets.load_from_disk(str(folder / split)))


def test_the_prompts_are_the_same_and_no_gold_text_is_a_target(folders: Folders, made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders.student)
    for gold, row in zip(rows(folders.data), rows(made), strict=True):
        assert (row["id"], row["prompt"], row["prompt_ids"]) == (gold["id"], gold["prompt"], gold["prompt_ids"])
        assert row["response_ids"] != gold["response_ids"]
        assert row["response"] != gold["response"]
        answer = [token for token in row["response_ids"] if token != tokenizer.eos_token_id]
        assert tokenizer.decode(answer).strip() == row["response"]
        assert row["num_response_tokens"] == len(row["response_ids"])


def test_an_answer_ends_with_end_of_text_unless_it_was_cut(folders: Folders, made: Path) -> None:
    end = AutoTokenizer.from_pretrained(folders.student).eos_token_id
    for row in rows(made):
        assert len(row["response_ids"]) <= LONGEST
        assert row["response_ids"][-1] == end or len(row["response_ids"]) == LONGEST
        assert end not in row["response_ids"][:-1]


def test_greedy_answers_are_the_teachers_own(folders: Folders, tmp_path: Path) -> None:
    extra = ["--sampling-temperature", 0, "--num-train", 6]
    assert call(generate_seqkd, arguments(folders, tmp_path / "greedy", *extra)).status == 0
    teacher = AutoModelForCausalLM.from_pretrained(folders.teacher)
    for row in rows(tmp_path / "greedy"):
        ids = torch.tensor([row["prompt_ids"]])
        wanted = teacher.generate(ids, max_new_tokens=LONGEST, do_sample=False, attention_mask=torch.ones_like(ids))
        assert row["response_ids"] == wanted[0, ids.shape[1] :].tolist()


def test_the_dev_split_keeps_its_references(folders: Folders, made: Path) -> None:
    assert rows(made, "dev") == rows(folders.data, "dev")


def test_training_on_it_learns_the_teachers_words(folders: Folders, made: Path, tmp_path: Path) -> None:
    extra = ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", "--epochs", 3, "--data-dir", made]
    result = call(train, train_arguments(folders, tmp_path, *extra, teacher=False))
    assert result.status == 0, result.output
    records = [record for record in read_jsonl(tmp_path / "sft" / "seed10" / "metrics.jsonl") if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"]
    # The targets that training saw are the teacher's, counted by hand.
    split = load_split(made, "train", max_length=MAX_LENGTH)
    assert split.num_labels.tolist() == [row["num_response_tokens"] for row in rows(made)]


def test_the_manifest_says_whose_answers_they_are(folders: Folders, made: Path) -> None:
    manifest, gold = (json.loads((path / "manifest.json").read_text()) for path in (made, folders.data))
    assert manifest["fingerprint"] != gold["fingerprint"]
    assert manifest["responses_of"]["sampling"]["seed"] == 10
    assert manifest["tokenizer_fingerprint"] == gold["tokenizer_fingerprint"]


def test_an_interrupted_pass_ends_with_the_same_answers(
    folders: Folders, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    generate = generation.generate

    def interrupted(*positional: object, **named: object) -> list[list[int]]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*positional, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "generate", interrupted)
    assert call(generate_seqkd, arguments(folders, tmp_path / "cut")).status == 130
    assert not (tmp_path / "cut").exists()
    assert call(generate_seqkd, arguments(folders, tmp_path / "cut")).status == 0
    assert len(calls) == 4 + 7  # 10 blocks of 5, three of them done before
    assert rows(tmp_path / "cut") == rows(made)
    assert not list(tmp_path.glob("*.parts"))


def test_two_ranks_give_the_same_answers_as_one(folders: Folders, made: Path, tmp_path: Path) -> None:
    result = on_ranks("tools/generate_seqkd.py", arguments(folders, tmp_path / "two"), num_ranks=2)
    assert result.status == 0, result.output
    assert rows(tmp_path / "two") == rows(made)


def test_data_without_a_dev_split_is_trained_on_and_answered(folders: Folders, tmp_path: Path) -> None:
    mine = replace(folders, data=tmp_path / "data")
    command = ["--raw", folders.data_root / "short" / "raw.jsonl", "--tokenizer", folders.student]
    command += ["--output-dir", mine.data, "--num-dev", 0, "--max-prompt-length", 160, "--num-workers", 1]
    result = call(process_data, [*command, "--data-root", folders.data_root])
    assert result.status == 0, result.output
    result = call(generate_seqkd, arguments(mine, tmp_path / "seqkd", "--num-train", 16))
    assert result.status == 0, result.output
    assert rows(mine.data, "dev") == rows(tmp_path / "seqkd", "dev") == []
    extra = ["--type", "sft", "--num-stages", 1, "--curriculum", "whole-pool", "--num-dev", 0, "--num-train", 16]
    for data in (mine.data, tmp_path / "seqkd"):
        run = tmp_path / f"trained-on-{data.name}"
        result = call(train, train_arguments(folders, run, *extra, "--data-dir", data, teacher=False))
        assert result.status == 0, result.output
        assert (run / "sft" / "seed10" / "best" / "model.safetensors").is_file()


def test_answers_that_are_there_are_not_made_again(folders: Folders, made: Path) -> None:
    before = (made / "manifest.json").read_bytes()
    result = call(generate_seqkd, arguments(folders, made))
    assert result.status == 0 and f"{made} is there already" in result.last_line, result.output
    assert (made / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--num-train", 6], "--num-train was 48, is 6"),
        (["--model", "STUDENT"], "another teacher in --model"),
        (["--data-dir", "OTHER"], "other data in --data-dir"),
        (
            ["--seed", 11, "--sampling-temperature", 0.5],
            "--seed was 10, is 11; --sampling-temperature was 1.0, is 0.5",
        ),
        (["--max-length", 180], "--max-length was 192, is 180"),
        (["--dtype", "bf16"], "--dtype was fp32, is bf16"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_answers_that_were_made_otherwise_are_refused(
    folders: Folders, made: Path, tmp_path: Path, extra: list[object], told: str
) -> None:
    other = shutil.copytree(folders.data, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "other"}))
    places = {"STUDENT": folders.student, "OTHER": other}
    before = (made / "manifest.json").read_bytes()
    result = call(generate_seqkd, [*arguments(folders, made), *(places.get(str(word), word) for word in extra)])
    assert result.status == 2 and f"made otherwise ({told}); give another --output-dir" in result.last_line, (
        result.output
    )
    assert (made / "manifest.json").read_bytes() == before


def test_the_data_that_is_answered_is_not_taken_for_the_answers(folders: Folders, tmp_path: Path) -> None:
    result = call(generate_seqkd, arguments(folders, folders.data))
    assert result.status == 2 and "--output-dir is --data-dir" in result.last_line, result.output
    assert "delete" not in result.last_line
    gold = shutil.copytree(folders.data, tmp_path / "gold")
    result = call(generate_seqkd, arguments(folders, gold))
    assert result.status == 2 and f"{gold} holds data that no teacher answered" in result.last_line, result.output


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--max-length", 160], "leaves no room"),
        (["--max-length", 1026], "reads at most 1024 tokens"),
        (["--top-p", 0], "--top-p"),
        (["--eval-batch-size", 0], "--eval-batch-size is 0"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--data-dir", "/nowhere"], "/nowhere holds no processed data"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_are_refused(folders: Folders, tmp_path: Path, extra: list[object], words: str) -> None:
    result = call(generate_seqkd, arguments(folders, tmp_path / "out", *extra))
    assert result.status == 2
    assert result.last_line.startswith("error: ") and words in result.last_line
    assert not (tmp_path / "out").exists()
