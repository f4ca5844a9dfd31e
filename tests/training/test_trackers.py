"""Trackers: each gets every number with stage, T, r and pool, a resumed run goes on, one that fails ends no run."""

import dataclasses
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from pocl.cli.checks import parse_train
from pocl.cli.process import in_flags
from pocl.common.errors import UserError
from pocl.curriculum.schedule import CosineRate, Schedule
from pocl.curriculum.stages import baby_step
from pocl.training import trackers
from pocl.training.log import MetricsLog
from pocl.training.run_folder import RunFolder

BASE = ["--model", "student", "--teacher", "teacher", "--data-dir", "data", "--output-dir", "out"]
# Of 8 examples in 2 stages: pools of 4 and 8, T 1 and 2, r 0.5 and 1.
SCHEDULE = Schedule(
    baby_step(8, num_stages=2, epochs=1, temperature=(1, 2), kd_ratio=(0.5, 1)),
    np.arange(8),
    global_batch_size=4,
    seed=1,
    rate=CosineRate(1e-3),
)
WANTED = {"stage": [0, 1, 1], "temperature": [1, 2, 2], "kd_ratio": [0.5, 1, 1], "pool": [4, 8, 8], "loss": [3, 2, 1]}


def run_in(folder: Path) -> RunFolder:
    """A run that has been begun."""
    run = RunFolder(folder / "pocl" / "tfkl" / "seed10")
    run.path.mkdir(parents=True)
    run.config.write_text(json.dumps({"options": {"loss": {"type": "tfkl", "kd_ratio": [0.5, 1]}}}))
    return run


def logged(run: RunFolder, *names: str, steps: slice = slice(None), opened_at: int = 0) -> None:
    """Some of the three steps, as the trainer records them."""
    log = MetricsLog(run, 2, distils=True, report_to=names)
    log.open(opened_at)
    for update, loss in list(zip(SCHEDULE, WANTED["loss"], strict=True))[steps]:
        log.record_step(update, update.number + 1, {"loss": float(loss), "note": "text", "nothing": None})
    log.close()


def test_tensorboard_has_every_number_and_its_stage(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_in(tmp_path)
    logged(run, "tensorboard", steps=slice(2))
    logged(run, "tensorboard", steps=slice(2, 3), opened_at=2)
    found = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert set(found.Tags()["scalars"]) == {*WANTED, "epoch"}
    for name, values in WANTED.items():
        points = found.Scalars(name)
        assert [point.step for point in points] == [1, 2, 3]
        assert [point.value for point in points] == pytest.approx(values)


def test_none_writes_metrics_alone(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    logged(run, "none")
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "metrics.jsonl"]
    assert [record["loss"] for record in run.read_metrics()] == WANTED["loss"]


def test_wandb_writes_an_offline_run_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = run_in(tmp_path)
    logged(run, "wandb", steps=slice(2))
    (known,) = json.loads((run.path / "trackers.json").read_text()).values()
    logged(run, "wandb", steps=slice(2, 3), opened_at=2)
    folders = sorted((run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(known) for folder in folders)
    raw = b"".join((folder / f"run-{known}.wandb").read_bytes() for folder in folders)
    assert all(name.encode() in raw for name in WANTED) and b"loss.kd_ratio" in raw


def test_mlflow_writes_a_database_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = run_in(tmp_path)
    logged(run, "mlflow", steps=slice(2))
    logged(run, "mlflow", steps=slice(2, 3), opened_at=2)
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        rows = base.execute("select key, step, value, run_uuid from metrics order by key, step").fetchall()
        (title,) = base.execute("select name from runs").fetchone()
        params = dict(base.execute("select key, value from params").fetchall())
    assert len({row[3] for row in rows}) == 1 and title == "pocl/tfkl/seed10"
    assert params == {"loss.type": "tfkl", "loss.kd_ratio": "[0.5, 1]"}
    for name, values in WANTED.items():
        points = {step: value for key, step, value, _ in rows if key == name}
        assert points == dict(zip((1, 2, 3), values, strict=True))


def test_trackio_writes_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils as utils

    for module in (storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio", raising=False)
    logged(run_in(tmp_path), "trackio")
    assert (tmp_path / "trackio").is_dir()
    records = storage.SQLiteStorage.get_logs("pocl", "pocl/tfkl/seed10")
    for name, values in WANTED.items():
        assert [record[name] for record in records if name in record] == values


class Failing:
    """A tracker whose server goes away after the first point."""

    tracker = dataclasses.make_dataclass("Run", [("id", str, "x1")])()
    points: list[int] = []

    def __init__(self, **given: object) -> None:
        self.given = given

    def start(self) -> None:
        """Nothing to do."""

    def store_init_configuration(self, values: dict) -> None:
        """Nothing to do."""

    def log(self, values: dict, step: int) -> None:
        if step > 1:
            raise ConnectionError("gone")
        self.points.append(step)


def test_a_tracker_that_fails_is_left_out_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_tracker_classes", lambda: {"wandb": Failing})
    said: list[str] = []
    monkeypatch.setattr(trackers, "say", said.append)
    run = run_in(tmp_path)
    logged(run, "wandb")
    assert Failing.points == [1] and len(run.read_metrics()) == 3
    assert said == ["wandb failed and is left out from here on (gone); metrics.jsonl has everything"]


def test_a_tracker_that_cannot_start_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: object) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(trackers, "_tracker_classes", lambda: {"wandb": refuse})
    with pytest.raises(UserError, match=r"`report_to` wandb cannot start: api_key not configured; .*WANDB_MODE"):
        logged(run_in(tmp_path), "wandb")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["wand"], "unknown --report-to 'wand'; did you mean 'wandb'?"),
        (["none", "tensorboard"], "--report-to none tensorboard: none goes with no other"),
        (["tensorboard", "mlflow"], "--report-to mlflow: its package is not installed; pip install mlflow"),
    ],
)
def test_what_cannot_be_reported_to_is_refused(flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(UserError) as caught:
        parse_train([*BASE, "--report-to", *flags])
    assert words in in_flags(str(caught.value))
