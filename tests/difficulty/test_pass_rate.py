"""The pass rate as a signal, and as the weights of PACED."""

from pathlib import Path

import numpy as np
import pytest

import train
from pocl.common.errors import UserError
from pocl.data.dataset import load_split
from pocl.difficulty.measuring import ScoringSettings
from pocl.difficulty.pass_rate import paced_weights, sample_block
from pocl.models.student import Student
from tests.runs import MAX_LENGTH, Folders, call, make_folders, read_jsonl, train_arguments


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair and data."""
    return make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")


def test_weights_are_largest_in_the_middle_and_1_on_average() -> None:
    rates = np.array([0.0, 0.25, 0.5, 1.0])
    weights = paced_weights(rates, np.arange(4))
    assert weights.tolist() == pytest.approx([0.0, 12 / 7, 16 / 7, 0.0])  # 3/16 and 1/4 over 7/64
    kept = paced_weights(rates, np.array([2, 3]))  # 1 on average of what is trained on
    assert kept[[2, 3]].mean() == pytest.approx(1.0) and kept[2] == pytest.approx(2.0)
    with pytest.raises(UserError, match="always or never"):
        paced_weights(rates, np.array([0, 3]))


def test_a_rate_is_of_exact_answers_or_else_of_their_overlap(folders: Folders) -> None:
    split = load_split(folders.data, "train", max_length=MAX_LENGTH, num_examples=3)
    student, references = Student.load(str(folders.student)), split.column("response")
    answers = {
        1: [references[0], "nothing of the kind", "zzz"],
        2: [references[0] + "!", "zzz", references[2]],
        3: ["zzz", "zzz", "zzz"],
        4: ["zzz", references[1].split()[0], references[2]],
    }

    def generator(prompts: list[list[int]], ids: list[int], sampling: object) -> list[list[int]]:
        return [student.tokenizer.encode(text) for text in answers[sampling.seed]]  # type: ignore[attr-defined]

    generator.name = "fake"  # type: ignore[attr-defined]
    records = sample_block(student, split, np.arange(3), ScoringSettings(), generator)  # type: ignore[arg-type]
    assert [record["pass_rate"] for record in records][::2] == [0.5, 0.5]
    words = len(references[1].split())
    assert 0 < records[1]["pass_rate"] <= 1 / 4 and words > 1


def test_a_run_weighs_its_examples_by_their_rates_and_says_what_it_lacks(folders: Folders, tmp_path: Path) -> None:
    flags = ["--curriculum", "whole-pool", "--num-stages", 1, "--num-dev", 0, "--pass-samples", 2]
    flags += ["--difficulty", "pass-rate"]
    for name, more in (("paced", ["--weighting", "paced"]), ("plain", [])):
        result = call(train, train_arguments(folders, tmp_path / name, *flags, *more))
        assert result.status == 0, result.output
    runs = [tmp_path / name / "tfkl" / "seed10" for name in ("paced", "plain")]
    rates = [record["pass_rate"] for record in read_jsonl(runs[0] / "difficulty.jsonl")]
    assert rates == sorted(rates, reverse=True) and 0 < max(rates) < 1
    assert not (runs[1] / "difficulty.jsonl").is_file()  # the whole pool needs no ranking
    losses = [read_jsonl(run / "metrics.jsonl")[0] for run in runs]
    assert losses[0]["cross_entropy"] == losses[1]["cross_entropy"] and losses[0]["loss"] != losses[1]["loss"]
    for wrong, words in (
        (["--weighting", "paced", "--difficulty", "student"], "give --difficulty pass-rate"),
        (["--weighting", "paced", "--type", "sft"], "--type sft has none"),
    ):
        refused = call(train, train_arguments(folders, tmp_path / "no", *flags, *wrong, teacher="sft" not in wrong))
        assert refused.status == 2 and words in refused.last_line, refused.output
