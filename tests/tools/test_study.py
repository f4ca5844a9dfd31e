"""The study of a real pair: equal updates in every arm, and the statistics of its table."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocl.cli.checks import parse_train
from pocl.cli.resolve import make_schedule
from tests.runs import call
from tools import study

PROGRAM = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
NEEDED = ("--model", "m", "--data-dir", "d", "--output-dir", "o", "--global-batch-size", "8")


@pytest.mark.parametrize("arm", study.ARMS)
def test_every_arm_makes_200_updates_of_320_examples(arm: str) -> None:
    teacher = () if arm == "SFT" else ("--teacher", "t")
    schedule = make_schedule(parse_train([*NEEDED, *teacher, *study.ARMS[arm]]), 320)
    assert schedule.total_steps == 200
    visits = np.bincount(np.concatenate([update.examples for update in schedule]), minlength=320)
    assert visits.sum() == 1600
    # The whole pool shows each example five times; pools show a quarter twice and a quarter eight times.
    staged = len(schedule.stages) == 4
    assert sorted(set(visits.tolist())) == ([2, 4, 6, 8] if staged else [5])


def test_differences_are_paired_by_training_seed(tmp_path: Path) -> None:
    for arm, scores in {"kld": [50, 52, 51], "pocl": [48, 49, 50]}.items():
        for seed, score in zip((10, 20, 30), scores, strict=True):
            found = {"rouge_l": score, "exact_match": 1.0} | ({"cross_entropy": seed / 100} if arm == "kld" else {})
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(found))
    command = ["--table", "--output-dir", tmp_path, "--arms", "KLD", "POCL", "SFT"]
    result = call(study, [*command, "--seeds", 10, 20, 30, 40])
    assert result.status == 0, result.output
    # -2, -3 and -1: mean -2, deviation 1, and 4.303 of Student's t with two degrees of freedom
    assert "-2.0 ± 2.5" in result.output and "0.074" in result.output
    assert result.output.count("0.200") == 1  # the cross-entropy of the arm that has one


def test_a_result_is_made_again_where_what_it_depends_on_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def run(what: study.StudyOptions, arm: str, seed: int) -> dict[str, float]:
        made.append(what.num_train)
        return {"rouge_l": 50.0, "exact_match": 0.0}

    monkeypatch.setattr(study, "run", run)
    for num_train in (320, 320, 160):
        command = ["--arms", "KLD", "--seeds", 10, "--output-dir", tmp_path, "--num-train", num_train]
        assert call(study, command).status == 0
    assert made == [320, 160]


def test_examples_that_fill_no_four_pools_are_refused() -> None:
    result = call(study, ["--num-train", 100])
    assert result.status == 2 and "is no multiple of 4 x 8" in result.last_line


def test_sigterm_ends_what_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_on_sigterm: Callable[..., None]
) -> None:
    (tmp_path / "train.py").write_text(PROGRAM, encoding="utf-8")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    ends_on_sigterm(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    result = call(study, ["--arms", "KLD", "--seeds", 10, "--output-dir", tmp_path / "results"])
    assert result.status == 130 and "the same command resumes" in result.last_line
    _, status = os.waitpid(int((tmp_path / "pid").read_text()), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "results").exists()
