"""A refused command leaves the way free for its correction; umask alone says who may read what is written."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from pocl.training.trainer import Trainer
from tests.runs import MAX_LENGTH, Folders, call, make_folders, train_arguments
from tools import generate_seqkd, make_student

SHORT = ("--num-stages", 1, "--num-train", 16, "--num-dev", 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A gpt2 pair and data."""
    return make_folders(tmp_path_factory.mktemp("gpt2"), "gpt2")


CORRECTIONS: dict[str, tuple[list[object], list[object]]] = {
    "LoRA targets": (["--lora-rank", 2, "--lora-targets", "cattn"], ["--lora-rank", 2, "--lora-targets", "c_attn"]),
    "last layers": (["--train-last-layers", 9], ["--train-last-layers", 1]),
    "backend": (["--generation-backend", "vllm"], []),
    "difficulty file": (["--difficulty-file", "nowhere.jsonl"], []),
}


@pytest.mark.parametrize("what", CORRECTIONS)
def test_a_refused_command_leaves_no_folder_and_its_correction_runs(
    folders: Folders, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_VLLM_PYTHON", "/nowhere/python")
    wrong, right = CORRECTIONS[what]
    refused = call(train, train_arguments(folders, tmp_path / "out", *SHORT, *wrong))
    assert refused.status == 2, refused.output
    assert not (tmp_path / "out").exists()
    result = call(train, train_arguments(folders, tmp_path / "out", *SHORT, *right))
    assert result.status == 0, result.output


def test_a_folder_without_a_step_is_no_run_and_its_ranking_is_not_taken_over(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop)
        assert call(train, train_arguments(folders, tmp_path, *SHORT, "--difficulty", "length")).status == 130
    path = tmp_path / "tfkl" / "seed10"
    assert "rouge_l" not in json.loads((path / "difficulty.jsonl").read_text().splitlines()[0])
    result = call(train, train_arguments(folders, tmp_path, *SHORT, "--lr", 1e-4))
    assert result.status == 0, result.output
    assert "rouge_l" in json.loads((path / "difficulty.jsonl").read_text().splitlines()[0])
    refused = call(train, train_arguments(folders, tmp_path, *SHORT, "--lr", 1e-3))
    assert refused.status == 2 and "lr was 0.0001, is 0.001" in refused.last_line


def test_the_same_command_keeps_the_ranking_that_it_has_made(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stop)
        assert call(train, train_arguments(folders, tmp_path, *SHORT)).status == 130
    ranking = tmp_path / "tfkl" / "seed10" / "difficulty.jsonl"
    made = ranking.stat().st_mtime_ns
    result = call(train, train_arguments(folders, tmp_path, *SHORT))
    assert result.status == 0 and ranking.stat().st_mtime_ns == made, result.output


# Permissions


@pytest.fixture(params=[0o022, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """What new files do not get."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_has_the_permissions_that_umask_leaves(folders: Folders, tmp_path: Path, umask: int) -> None:
    lora = ["--lora-rank", 2, "--keep-stages", "--teacher-cache", tmp_path / "cache"]
    assert call(train, train_arguments(folders, tmp_path / "run", *SHORT, *lora)).status == 0
    answers = ["--model", folders.teacher, "--data-dir", folders.data, "--max-length", MAX_LENGTH]
    assert call(generate_seqkd, [*answers, "--output-dir", tmp_path / "seqkd"]).status == 0
    small = ["--model", folders.student, "--layers", 1, "--output-dir", tmp_path / "small"]
    assert call(make_student, small).status == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"model.safetensors", "adapter_model.safetensors", "rank-0.safetensors", "weights.safetensors"}
    wrong = {str(path): oct(path.stat().st_mode) for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask}
    assert not wrong
