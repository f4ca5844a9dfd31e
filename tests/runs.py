"""What the run-level tests share: a processed set, model pairs, commands in this process."""

import contextlib
import functools
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.tiny import ROOT, save_pair, tiny_tokenizer

# Short enough that a run takes seconds: 48 prompts of at most 160 tiny tokens, answers of at most 32.
NUM_TRAIN, MAX_PROMPT, MAX_LENGTH = 48, 160, 192


@dataclass(frozen=True)
class Folders:
    """A student, a teacher, processed data, an evaluation set."""

    student: Path
    teacher: Path
    data: Path
    data_root: Path


def make_folders(root: Path, family: str) -> Folders:
    """All of them under ``root``: copies of what this process has built once."""
    shutil.copytree(_built(family).name, root, dirs_exist_ok=True)
    return _laid_out(root)


def _laid_out(root: Path) -> Folders:
    return Folders(root / "student", root / "teacher", root / "processed", root / "data")


@functools.cache
def _built(family: str) -> tempfile.TemporaryDirectory[str]:
    from tools import process_data

    root = tempfile.TemporaryDirectory(prefix=f"pocl-{family}-")
    folders = _laid_out(Path(root.name))
    save_pair(family, folders.student, folders.teacher, tiny_tokenizer())
    short = folders.data_root / "short"
    short.mkdir(parents=True)
    lines = (ROOT / "data" / "sample" / "raw.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines = sorted(lines, key=len)[: NUM_TRAIN + 8]
    random.Random(0).shuffle(lines)
    (short / "raw.jsonl").write_text("".join(lines), encoding="utf-8")
    (short / "valid.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    result = call(
        process_data,
        ["--raw", short / "raw.jsonl", "--tokenizer", folders.student, "--output-dir", folders.data]
        + ["--num-dev", 8, "--max-prompt-length", MAX_PROMPT, "--num-workers", 1, "--data-root", folders.data_root],
    )
    assert result.status == 0, result.output
    return root


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        return self.output.strip().splitlines()[-1]


def call(module: Any, arguments: Sequence[object]) -> Result:
    """Run a tool's or entry point's main in this process, as ``python FILE ARGUMENTS`` would."""
    from pocl.cli.process import run_main

    captured, status = io.StringIO(), 0
    argv = [str(module.__file__), *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(captured),
        contextlib.redirect_stderr(captured),
    ):
        try:
            run_main(module.main)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    return Result(status, captured.getvalue())


def train_until_stage(arguments: Sequence[object], stage: int) -> None:
    """train.py, stopped as by Ctrl-C behind the checkpoint that ends the first ``stage`` stages."""
    import train
    from pocl.training.checkpoints import Checkpoints
    from pocl.training.position import Position

    save_last = Checkpoints.save_last

    def save_and_stop(self: Checkpoints, position: Position, rank_state: dict[str, object]) -> None:
        save_last(self, position, rank_state)
        if position.stage == stage:
            raise KeyboardInterrupt

    with mock.patch.object(Checkpoints, "save_last", save_and_stop):
        assert call(train, arguments).status == 130


def train_arguments(folders: Folders, output_dir: Path, *extra: object, teacher: bool = True) -> list[str]:
    """A short train.py command: 4 stages, 1 epoch each, greedy dev evaluation of 4 prompts."""
    arguments = ["--model", folders.student, "--data-dir", folders.data, "--output-dir", output_dir]
    arguments += ["--teacher", folders.teacher] if teacher else []
    arguments += ["--max-length", MAX_LENGTH, "--global-batch-size", 8, "--batch-size", 4, "--epochs", 1]
    arguments += ["--num-dev", 4, "--sampling-temperature", 0, "--lr", 1e-3, "--bucket-examples", 0, *extra]
    return [str(argument) for argument in arguments]


def examples_of(batch: Any) -> list[tuple[list[int], list[int]]]:
    """(input tokens, labels) of each example of a micro-batch, padded or packed; padding has to have no label."""
    if batch.segments is not None:
        parts = (tensor[0].split(batch.segments.lengths) for tensor in (batch.input_ids, batch.labels))
        return [(ids.tolist(), labels.tolist()) for ids, labels in zip(*parts, strict=True)]
    lengths = batch.attention_mask.sum(-1).tolist()
    assert all((row[length:] == -100).all() for row, length in zip(batch.labels, lengths, strict=True))
    rows = zip(batch.input_ids.tolist(), batch.labels.tolist(), lengths, strict=True)
    return [(ids[:length], labels[:length]) for ids, labels, length in rows]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
