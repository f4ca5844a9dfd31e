"""evaluate.py at scale: what is there is not answered again, the clean protocol, prompts that were trained on."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

import evaluate
from pocl.evaluation import load_set
from pocl.files import write_jsonl
from pocl.generation import BuiltIn
from tests.runs import Folders, Result, call, make_folders, read_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("evaluate"), "gpt2")


def evaluated(folders: Folders, output_dir: Path, *extra: object) -> Result:
    arguments = ["--model", folders.student, "--sets", "short", "--data-root", folders.data_root, "--max-length", 192]
    result = call(evaluate, [*arguments, "--max-prompt-length", 160, "--output-dir", output_dir, *extra])
    assert result.status == 0, result.output
    return result


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())["short"]


def test_seeds_that_are_there_are_not_answered_again(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    answer = BuiltIn.__call__

    def counted(self: BuiltIn, prompts: object, ids: list[int], sampling: object) -> object:
        asked.append(sampling.seed)  # type: ignore[attr-defined]
        return answer(self, prompts, ids, sampling)  # type: ignore[arg-type]

    monkeypatch.setattr(BuiltIn, "__call__", counted)
    evaluated(folders, tmp_path, "--seeds", 1, 2)
    before = (tmp_path / "short" / "1.jsonl").read_bytes()
    result = evaluated(folders, tmp_path, "--seeds", 1, 2, 3)
    assert asked == [1, 2, 3]
    assert "seeds 1 2 are there already" in result.output
    assert (tmp_path / "short" / "1.jsonl").read_bytes() == before
    assert list(summary(tmp_path)["rouge_l"]["seeds"]) == ["1", "2", "3"]  # type: ignore[index]
    evaluated(folders, tmp_path, "--seeds", 1, "--top-p", 0.9)  # another protocol
    assert asked == [1, 2, 3, 1]


def test_a_seed_whose_file_is_gone_is_answered_again(folders: Folders, tmp_path: Path) -> None:
    evaluated(folders, tmp_path, "--seeds", 1, 2)
    lost = (tmp_path / "short" / "2.jsonl").read_bytes()
    (tmp_path / "short" / "2.jsonl").unlink()
    evaluated(folders, tmp_path, "--seeds", 1, 2)
    assert (tmp_path / "short" / "2.jsonl").read_bytes() == lost


def test_the_clean_protocol_is_greedy_and_bans_nothing(folders: Folders, tmp_path: Path) -> None:
    result = evaluated(folders, tmp_path / "both", "--seeds", 1, "--clean")
    assert "greedy" in result.output
    protocol = summary(tmp_path / "both" / "clean")["protocol"]
    assert (protocol["temperature"], protocol["no_repeat_ngram"]) == (0.0, 0)  # type: ignore[index]
    evaluated(folders, tmp_path / "greedy", "--seeds", 1, "--sampling-temperature", 0, "--no-repeat-ngram", 0)
    clean, greedy = (
        read_jsonl(path / "short" / "1.jsonl") for path in (tmp_path / "both" / "clean", tmp_path / "greedy")
    )
    assert clean == greedy != read_jsonl(tmp_path / "both" / "short" / "1.jsonl")


def test_prompts_of_the_training_data_are_listed_and_left_out(folders: Folders, tmp_path: Path) -> None:
    # The set is the first five records of the raw file, which are dev records; make two of them training prompts.
    train = datasets.load_from_disk(str(folders.data / "train"))
    examples = load_set(folders.data_root, "short")
    assert not {example.prompt for example in examples} & set(train["prompt"])
    prompts = [examples[1].prompt, examples[3].prompt, *train["prompt"][2:]]
    changed = tmp_path / "processed"
    train.remove_columns("prompt").add_column("prompt", prompts).save_to_disk(str(changed / "train"))
    (changed / "manifest.json").write_bytes((folders.data / "manifest.json").read_bytes())
    result = evaluated(folders, tmp_path / "eval", "--seeds", 1, 2, "--train-data", changed)
    found = summary(tmp_path / "eval")["contaminated"]
    assert found["ids"] == [1, 3]  # type: ignore[index]
    rest = [
        record["rouge_l"]
        for seed in (1, 2)
        for record in read_jsonl(tmp_path / "eval" / "short" / f"{seed}.jsonl")
        if record["id"] not in (1, 3)
    ]
    assert found["without"]["rouge_l"] == pytest.approx(sum(rest) / 6)  # type: ignore[index]
    assert "unseen: ROUGE-L less the prompts that stand in the training data (short 2)" in result.output.replace(
        "\n", " "
    )
    evaluated(folders, tmp_path / "fresh", "--seeds", 1, "--train-data", folders.data)
    assert summary(tmp_path / "fresh")["contaminated"]["ids"] == []  # type: ignore[index]


def test_answers_of_one_set_keep_the_scores_of_another(folders: Folders, tmp_path: Path) -> None:
    shutil.copytree(folders.data_root / "short", tmp_path / "data" / "short")
    shutil.copytree(folders.data_root / "short", tmp_path / "data" / "other")
    write_jsonl(tmp_path / "answers.jsonl", [{"text": "Yes."}] * 5)
    for name in ("short", "other"):
        arguments = ["--answers", tmp_path / "answers.jsonl", "--sets", name, "--data-root", tmp_path / "data"]
        result = call(evaluate, [*arguments, "--output-dir", tmp_path / "eval"])
        assert result.status == 0, result.output
    found = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert sorted(found) == ["other", "short"] and found["other"] == found["short"]


def test_a_length_that_the_model_has_no_positions_for_is_refused(folders: Folders, tmp_path: Path) -> None:
    arguments = ["--model", folders.student, "--sets", "short", "--data-root", folders.data_root]
    result = call(evaluate, [*arguments, "--max-length", 1026, "--output-dir", tmp_path / "eval"])
    assert result.status == 2 and "--max-length 1026" in result.last_line, result.output
    assert "reads at most 1024 tokens" in result.last_line and not (tmp_path / "eval").exists()
