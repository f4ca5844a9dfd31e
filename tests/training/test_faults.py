"""Runs that are killed, and disks that refuse: what is left is whole, and the same command goes on from it."""

import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from pocl.common.errors import UserError
from pocl.training.run_folder import RunFolder
from pocl.training.statefile import load_state, save_state
from tests.ranks import on_ranks
from tests.runs import Folders, Result, call, read_jsonl, train_arguments, train_until_stage

SHORT = ("--difficulty", "length", "--num-dev", 0, "--eval-every", 1)


@pytest.mark.parametrize("cases", [["pocl", "gkd-2"], ["lora", "evaluate"]], ids="-".join)
def test_killed_runs_end_as_if_nobody_had_killed_them(cases: list[str]) -> None:
    arguments = ["--kills", 6, "--kills-per-run", 3, "--cases", *cases]
    result = on_ranks("tests/faults/__main__.py", arguments, num_ranks=1, timeout=400)
    assert result.status == 0 and "6 kills, 0 runs lost" in result.output, result.output


@pytest.fixture(scope="module")
def whole(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that came to its end, with its stages' students. Read only."""
    place = tmp_path_factory.mktemp("whole")
    assert call(train, train_arguments(folders, place, *SHORT, "--keep-stages")).status == 0
    return place / "tfkl" / "seed10"


@pytest.fixture(scope="module")
def cut(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that ended after stage 2. Read only."""
    place = tmp_path_factory.mktemp("cut")
    train_until_stage(train_arguments(folders, place, *SHORT), 2)
    return place


# --- the disk ---


def call_with_little_disk(arguments: Sequence[object], num_bytes: int) -> Result:
    """train.py while files may hold this much at most: the system refuses what is beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        return call(train, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(
    whole: Path, cut: Path, folders: Folders, tmp_path: Path
) -> None:
    arguments, run = train_arguments(folders, tmp_path, *SHORT), tmp_path / "tfkl" / "seed10"
    # best/ fits into 400 kB, a checkpoint with AdamW's two moments does not.
    result = call_with_little_disk(arguments, 400_000)
    assert result.status == 1, result.output
    assert "error: cannot write" in result.last_line and "checkpoints/step-1" in result.last_line
    assert "File too large (os error 27); no checkpoint was kept yet" in result.last_line
    assert not list(run.glob("checkpoints/*")) and not list(run.glob("*.tmp"))
    shutil.rmtree(run)
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    result = call_with_little_disk(arguments, 400_000)
    assert result.status == 1 and "the checkpoint of step 4 is kept; the same command resumes" in result.last_line
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["last.json", "step-4"]
    assert call(train, arguments).status == 0
    for name in ("best/model.safetensors", "ledger.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_best_student_that_does_not_fit_leaves_nothing_half_written(folders: Folders, tmp_path: Path) -> None:
    result = call_with_little_disk(train_arguments(folders, tmp_path, *SHORT), 200_000)
    assert result.status == 1
    assert "cannot write" in result.last_line and "best.tmp" in result.last_line
    assert not list((tmp_path / "tfkl" / "seed10").glob("best*"))


def test_a_record_that_cannot_be_appended_ends_the_run_in_one_line(folders: Folders, tmp_path: Path) -> None:
    arguments = train_arguments(folders, tmp_path, *SHORT)

    def append_to_a_full_disk(self: RunFolder, record: Mapping[str, Any]) -> None:
        with open("/dev/full", "a", encoding="utf-8") as file:
            file.write("{}\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append_to_a_full_disk)
        result = call(train, arguments)
    assert result.status == 1
    assert result.last_line.startswith("error: ") and "No space left on device" in result.last_line
    assert call(train, arguments).status == 0


def test_a_place_that_cannot_be_written_to_is_refused(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call(train, train_arguments(folders, tmp_path / "file", *SHORT))
    assert result.status == 2
    assert "cannot write" in result.last_line and str(tmp_path / "file") in result.last_line


@pytest.fixture
def cut_run(cut: Path, folders: Folders, tmp_path: Path) -> tuple[list[str], Path]:
    """The command and the folder of a run that ended after stage 2."""
    shutil.copytree(cut, tmp_path, dirs_exist_ok=True)
    return train_arguments(folders, tmp_path, *SHORT), tmp_path / "tfkl" / "seed10"


@pytest.mark.parametrize("name", ["rank-0.safetensors", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbled", "foreign"])
def test_a_damaged_checkpoint_is_told_and_left_alone(cut_run: tuple[list[str], Path], name: str, damage: str) -> None:
    arguments, run = cut_run
    (path,) = run.glob(f"checkpoints/step-*/{name}")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
        words = f"{name} has {len(content) - 100} of {len(content)} bytes: the last checkpoint is damaged"
    elif damage == "gone":
        path.unlink()
        words = f"{name} is missing: the last checkpoint is damaged"
    elif damage == "garbled":
        path.write_bytes(b"\xff" * len(content))
        words = f"{name} is truncated or not a saved run state"
    else:
        save_file({"x": torch.zeros(2)}, path)
        words = f"{name} has"
    before = (run / "best" / "model.safetensors").read_bytes()
    result = call(train, arguments)
    assert result.status == 2 and words in result.last_line, result.output
    assert (run / "best" / "model.safetensors").read_bytes() == before


def test_stage_ends_are_kept_where_it_is_asked(whole: Path) -> None:
    stages = sorted(whole.glob("stages/*"))
    assert [path.name for path in stages] == ["stage-1", "stage-2", "stage-3", "stage-4"]
    weights = [load_file(path / "model.safetensors")["transformer.wte.weight"] for path in stages]
    assert all(not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False))
    assert (stages[-1] / "model.safetensors").read_bytes() == (whole / "best" / "model.safetensors").read_bytes()
    assert len(list(whole.glob("checkpoints/step-*"))) == 1


# --- another number of ranks ---


def test_another_world_size_goes_on_from_the_weights_when_asked(
    whole: Path, cut_run: tuple[list[str], Path], folders: Folders
) -> None:
    arguments, run = cut_run
    at_the_stop = read_jsonl(run / "metrics.jsonl")
    result = on_ranks("train.py", [*arguments, "--resume-weights"], num_ranks=2)
    assert result.status == 0, result.output
    assert "resuming from the weights of step 4, which 1 rank(s) trained; AdamW's moments" in result.output
    records = read_jsonl(run / "metrics.jsonl")
    assert records[: len(at_the_stop)] == at_the_stop
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 15))
    fifth, same = (next(r for r in read_jsonl(path / "metrics.jsonl") if r["step"] == 5) for path in (run, whole))
    assert fifth["loss"] == pytest.approx(same["loss"], rel=1e-4)  # the weights are the same, to rounding
    assert fifth["gradient_norm"] == pytest.approx(same["gradient_norm"], rel=1e-3)


# --- the state's file ---


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "m": shared[1:4]}, 1: {"m": shared}},
        "groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "on": True, "none": None, "name": "é\n"}],
        "empty": {},
        "bits": torch.zeros(2, dtype=torch.bfloat16),
        "a.b": torch.ones(1),
        "a": {"b": torch.full((1,), 2.0)},
    }
    save_state(tmp_path / "x.safetensors", state)
    found = load_state(tmp_path / "x.safetensors")
    assert torch.equal(found["state"][0]["m"], shared[1:4]) and torch.equal(found["state"][1]["m"], shared)
    assert found["groups"] == [{"lr": 1e-3, "betas": [0.9, 0.999], "on": True, "none": None, "name": "é\n"}]
    assert found["empty"] == {} and found["bits"].dtype == torch.bfloat16
    assert (found["a.b"].item(), found["a"]["b"].item()) == (1.0, 2.0)


def test_a_state_holds_no_objects_and_reads_no_other_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds a object"):
        save_state(tmp_path / "x", {"a": [object()]})
    with pytest.raises(UserError, match="does not exist"):
        load_state(tmp_path / "none")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(UserError, match="not a saved run state"):
        load_state(tmp_path / "plain")
