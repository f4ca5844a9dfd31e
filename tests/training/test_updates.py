"""Runs of a given number of updates, with a warm-up, in an order of their own: through train.py, and resumed."""

import json
from pathlib import Path

import pytest

import train
from tests.runs import Folders, call, make_folders, read_jsonl, train_arguments, train_until_stage

FLAGS = ("--max-steps", 9, "--warmup-steps", 1, "--curriculum", "exposure-matched", "--difficulty", "length")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair and data."""
    return make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")


def test_a_run_takes_its_updates_and_resumes_within_them(folders: Folders, tmp_path: Path) -> None:
    records = {}
    for name in ("whole", "cut"):
        arguments = train_arguments(folders, tmp_path / name, *FLAGS, "--num-dev", 2, "--epochs", 2)
        if name == "cut":
            train_until_stage(arguments, 2)
        result = call(train, arguments)
        assert result.status == 0, result.output
        run = tmp_path / name / "tfkl" / "seed10"
        records[name] = [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]
        assert json.loads((run / "ledger.json").read_text())["optimizer_steps"] == 9
    # 48 examples, batches of 8: pools of 12, 24, 36, 48 take 1, 3, 4, 6 steps an epoch, so 9 updates are 1, 2, 2, 4
    assert [record["stage"] for record in records["whole"]] == [0, 1, 1, 2, 2, 3, 3, 3, 3]
    # one step of warm-up in a stage: half the peak where there is a step behind it
    assert [record["lr"] for record in records["whole"]][1:3] == [5e-4, 1e-3]
    assert [record["loss"] for record in records["cut"]] == [record["loss"] for record in records["whole"]]


def test_stages_have_divergences_of_their_own_over_the_easiest_share(folders: Folders, tmp_path: Path) -> None:
    flags = ["--keep-share", 0.7, "--type-of-stage", "tfkl", "tfkl", "trkl", "trkl", "--difficulty", "length"]
    flags += ["--temperature", 1, "--kd-ratio", 1]
    result = call(train, train_arguments(folders, tmp_path / "mixed", *flags, "--num-dev", 0))
    assert result.status == 0, result.output
    run = tmp_path / "mixed" / "tfkl" / "seed10"
    stages = json.loads((run / "stages.json").read_text())
    assert [stage["loss"] for stage in stages] == ["tfkl", "tfkl", "trkl", "trkl"]
    assert [stage["pool"] for stage in stages] == [[0, 8], [0, 16], [0, 24], [0, 33]]  # 70 % of 48
    # Each stage's first loss is that of a run of this divergence from the same weights: forward for the first.
    forward = train_arguments(folders, tmp_path / "forward", *flags[:2], *flags[7:], "--num-dev", 0)
    assert call(train, forward).status == 0
    losses = [read_losses(run), read_losses(tmp_path / "forward" / "tfkl" / "seed10")]
    assert losses[0][:3] == losses[1][:3] and losses[0][3] != losses[1][3]


def read_losses(run: Path) -> list[float]:
    """The loss of each step."""
    return [record["loss"] for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-steps", 3], "--max-steps 3 is fewer than the 4 stages"),
        (["--warmup-steps", 2.5], "--warmup-steps is 2.5; it is a whole number, or a share below 1"),
        (["--curriculum", "exposure-matched", "--rerank", "stage"], "it cannot rank again"),
        (["--type-of-stage", "tfkl", "trkl"], "--type-of-stage has 2 names for 4 stage(s)"),
        (["--type-of-stage", "tfkl", "tfkl", "rkl", "rkl"], "--type-of-stage rkl beside --type tfkl"),
        (["--keep-share", 0.5, "--curriculum", "random"], "--curriculum random has no order"),
    ],
)
def test_what_cannot_be_planned_is_refused(folders: Folders, tmp_path: Path, flags: list[object], words: str) -> None:
    result = call(train, train_arguments(folders, tmp_path / "out", *flags))
    assert result.status == 2 and words in result.last_line, result.output
    assert not (tmp_path / "out").exists()
