"""The public interface, used as a library: what train.py does, without its command line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import pocl
import train
from pocl.data.micro_batches import MicroBatchLimits
from tests.runs import MAX_LENGTH, Folders, call, read_jsonl, train_arguments
from tests.tiny import ROOT


def test_every_public_name_is_there_and_listed() -> None:
    assert sorted(set(pocl.__all__)) == sorted(pocl.__all__)
    for name in pocl.__all__:
        assert getattr(pocl, name) is not None
    assert set(pocl.__all__) <= set(dir(pocl))
    with pytest.raises(AttributeError, match="no attribute 'Studnet'"):
        pocl.Studnet  # noqa: B018


def test_six_objects_train_what_train_py_trains(folders: Folders, tmp_path: Path) -> None:
    command = ["--num-stages", 2, "--batch-size", 64, "--chunk-tokens", 64, "--num-dev", 0, "--packing", "off"]
    zero = ROOT / "scripts" / "deepspeed" / "zero0.json"
    command += ["--deepspeed-config", zero]
    result = call(train, train_arguments(folders, tmp_path / "command", *command))
    assert result.status == 0, result.output

    examples = pocl.load_split(str(folders.data), "train", max_length=MAX_LENGTH)
    student = pocl.Student.load(str(folders.student))
    teacher = pocl.Teacher.open(str(folders.teacher), examples, cache=tmp_path / "cache")
    scoring = pocl.ScoringSettings(max_new_tokens=32)
    ranking = pocl.rank(examples, student, signals=["student"], settings=scoring, folder=str(tmp_path / "ranking"))
    stages = pocl.baby_step(len(examples), num_stages=2, epochs=1, temperature=(1, 2), kd_ratio=(0.7, 1))
    rate = pocl.CosineRate(1e-3, 1e-7)
    schedule = pocl.Schedule(stages, ranking.order, global_batch_size=8, seed=10, rate=rate)
    loss = pocl.DistillationLoss("tfkl", chunk_tokens=64)
    run = pocl.RunFolder(str(tmp_path / "library"))
    settings = pocl.TrainSettings(limits=MicroBatchLimits(4096, 64, 64))
    trainer = pocl.Trainer(
        student, teacher, schedule, loss, data=pocl.TrainingData(examples), run=run, settings=settings
    )
    position = trainer.fit()

    theirs = tmp_path / "command" / "tfkl" / "seed10"
    assert position.done and position.step == schedule.total_steps
    assert [r["id"] for r in ranking.records] == [r["id"] for r in read_jsonl(theirs / "difficulty.jsonl")]
    mine, wanted = ([record["loss"] for record in read_jsonl(path / "metrics.jsonl")] for path in (run.path, theirs))
    assert mine == wanted
    ours, weights = (load_file(path / "best" / "model.safetensors") for path in (run.path, theirs))
    assert all((ours[name] == weights[name]).all() for name in weights)
    assert json.loads((run.path / "ledger.json").read_text())["finished"]
