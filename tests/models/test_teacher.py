"""The teacher cache: exact, resumable, refused where it is stale."""

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import train
from pocl.common.errors import UserError
from pocl.common.resumable_pass import ResumablePass
from pocl.data.blocks import READING_TOKENS, blocks_to_read
from pocl.data.dataset import load_split
from pocl.models import teacher_cache as teachers
from pocl.models.identity import count_parameters
from pocl.models.loading import load_model
from pocl.models.teacher import Teacher
from tests.ranks import on_ranks
from tests.runs import (
    MAX_LENGTH,
    Folders,
    call,
    make_folders,
    read_jsonl,
    train_arguments,
    train_until_stage,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("teacher"), "opt")  # its head is narrower than its layers


def build(folders: Folders, folder: Path, dtype: str = "fp32", *, max_length: int = MAX_LENGTH) -> Teacher:
    split = load_split(folders.data, "train", max_length=max_length)
    return Teacher.open(str(folders.teacher), split, cache=folder, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_cached_logits_are_the_online_ones(folders: Folders, tmp_path: Path, dtype: str, tolerance: float) -> None:
    split = load_split(folders.data, "train", max_length=MAX_LENGTH)
    online = Teacher.open(str(folders.teacher), dtype=dtype)
    cached = build(folders, tmp_path / "cache", dtype)
    for positions in ([0, 5, 47], [46], [3, 2, 1, 0]):
        batch = split.batch(positions)
        wanted, got = online.states(batch), cached.states(batch)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        torch.testing.assert_close(cached.head(got), online.head(wanted), atol=tolerance, rtol=tolerance)


def test_a_run_with_a_cache_follows_the_online_curve(folders: Folders, tmp_path: Path) -> None:
    curves = {}
    for name, where in {"online": "off", "built": tmp_path / "cache", "reused": tmp_path / "cache"}.items():
        flags = ["--teacher-cache", where, "--num-stages", 2, "--num-dev", 0]
        result = call(train, train_arguments(folders, tmp_path / name, *flags))
        assert result.status == 0, result.output
        run = tmp_path / name / "tfkl" / "seed10"
        curves[name] = [record["loss"] for record in read_jsonl(run / "metrics.jsonl")]
        ledger = json.loads((run / "ledger.json").read_text())
        assert ledger["teacher_forward_passes"] == (ledger["samples"] if name == "online" else 48)
    assert curves["built"] == pytest.approx(curves["online"], rel=1e-5, abs=1e-6)
    assert curves["reused"] == curves["built"]


def watch_weights(model: PreTrainedModel) -> list[int]:
    """How many weights of an offloaded model have memory on the device, whenever one of its layers computes."""
    seen: list[int] = []

    def counted(forward: Callable[..., object]) -> Callable[..., object]:
        def call_and_count(*args: object, **kwargs: object) -> object:
            there = {id(weight): weight.numel() for weight in model.parameters() if not weight.is_meta}
            seen.append(sum(there.values()))
            return forward(*args, **kwargs)

        return call_and_count

    for layer in model.modules():
        if hasattr(layer, "_old_forward") and not list(layer.children()):
            layer._old_forward = counted(layer._old_forward)  # what accelerate's hook calls
    return seen


def test_an_offloaded_teacher_has_one_layer_on_the_device(folders: Folders, tmp_path: Path) -> None:
    split, model = load_split(folders.data, "train", max_length=MAX_LENGTH), load_model(str(folders.teacher))
    whole, largest = count_parameters(model), max(parameter.numel() for parameter in model.parameters())
    wanted = Teacher.open(str(folders.teacher))
    online, batch = Teacher.of(model, CPU, layerwise=True), split.batch([0, 5, 47])
    seen = watch_weights(model)
    assert torch.equal(online.states(batch), wanted.states(batch))
    assert torch.equal(online.head(online.states(batch)), wanted.head(wanted.states(batch)))
    assert max(seen) == largest < whole * 0.6 and len(seen) > 10
    cached = online.cached(split, tmp_path / "cache")
    torch.testing.assert_close(cached.head(cached.states(batch)), wanted.head(wanted.states(batch)))
    build(folders, tmp_path / "plain")
    assert (tmp_path / "cache" / "states.bin").read_bytes() == (tmp_path / "plain" / "states.bin").read_bytes()


@pytest.mark.parametrize("extra", [["--teacher-cache", "off"], [], ["--on-policy", "mixed"]])
def test_a_run_with_an_offloaded_teacher_is_the_same_run(folders: Folders, tmp_path: Path, extra: list[str]) -> None:
    ends = []
    for offload in ("auto", "on"):
        flags = [*extra, "--teacher-offload", offload, "--num-dev", 0, "--num-stages", 1, "--num-train", 24]
        flags += ["--curriculum", "whole-pool", "--temperature", 1, "--kd-ratio", 1]
        result = call(train, train_arguments(folders, tmp_path / offload, *flags))
        assert result.status == 0, result.output
        assert ("its layers go to the device one by one" in result.output) == (offload == "on")
        run = tmp_path / offload / "tfkl" / "seed10"
        ends.append((run / "best" / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_two_ranks_build_the_same_file_as_one(folders: Folders, tmp_path: Path) -> None:
    for num_ranks in (1, 2):
        extra = ["--teacher-cache", tmp_path / f"cache{num_ranks}", "--num-dev", 0, "--num-stages", 1, "--epochs", 1]
        extra += ["--kd-ratio", 1, "--temperature", 1, "--curriculum", "whole-pool"]
        arguments = train_arguments(folders, tmp_path / str(num_ranks), *extra)
        result = call(train, arguments) if num_ranks == 1 else on_ranks("train.py", arguments, num_ranks=num_ranks)
        assert result.status == 0, result.output
    assert (tmp_path / "cache1" / "states.bin").read_bytes() == (tmp_path / "cache2" / "states.bin").read_bytes()


def test_a_pass_that_was_cut_off_reads_only_what_is_missing(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READING_TOKENS, "cpu", 1100)
    build(folders, tmp_path / "whole")
    num_blocks = len(blocks_to_read(load_split(folders.data, "train", max_length=MAX_LENGTH).lengths, CPU))
    assert 4 < num_blocks <= 8
    read: list[int] = []
    original, verify = teachers.response_states, teachers._verify

    def counted(model: object, batch: object) -> torch.Tensor:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(1)
        return original(model, batch)  # type: ignore[arg-type]

    def verify_uncounted(*arguments: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(teachers, "response_states", original)
            verify(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(teachers, "_verify", verify_uncounted)

    monkeypatch.setattr(teachers, "response_states", counted)
    with pytest.raises(KeyboardInterrupt):
        build(folders, tmp_path / "cut")
    assert not (tmp_path / "cut" / "manifest.json").exists()
    read.clear()
    build(folders, tmp_path / "cut")
    assert len(read) == num_blocks - 4
    assert (tmp_path / "cut" / "states.bin").read_bytes() == (tmp_path / "whole" / "states.bin").read_bytes()


def test_a_rank_writes_the_bytes_of_its_own_examples_and_no_others(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a neighbour's rows nor, by a mapping, the pages that it shares with them."""
    monkeypatch.setitem(READING_TOKENS, "cpu", 1100)
    split = load_split(folders.data, "train", max_length=MAX_LENGTH)
    width = build(folders, tmp_path / "whole").states(split.batch([0])).shape[1]
    blocks = blocks_to_read(split.lengths, CPU)
    written: list[tuple[int, int]] = []
    starts = 4 * width * np.concatenate([[0], np.cumsum(split.num_labels)])
    pwrite, mapped = os.pwrite, np.memmap

    def half(file: int, data: memoryview, start: int) -> int:
        """As a file system may: not all at once."""
        count = pwrite(file, data[: len(data) // 2 + 1], start)
        written.append((start, start + count))
        return count

    def only_read(*arguments: object, mode: str, **options: object) -> np.memmap:
        assert mode == "r"
        return mapped(*arguments, mode=mode, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(teachers.os, "pwrite", half)
    monkeypatch.setattr(teachers.np, "memmap", only_read)

    def first_of_two(
        self: ResumablePass,
        blocks: list[np.ndarray],
        ids: np.ndarray,
        work: Callable[[np.ndarray], object],
        *,
        title: str,
    ) -> None:
        for block in blocks[::2]:
            work(block)

    monkeypatch.setattr(ResumablePass, "fill", first_of_two)
    monkeypatch.setattr(teachers, "_verify", lambda *_: None)  # the other rank's rows are missing
    build(folders, tmp_path / "half")
    mine = np.sort(np.concatenate(blocks[::2]))
    bytes_of = np.zeros(starts[-1], dtype=int)
    for start, stop in written:
        bytes_of[start:stop] += 1
    wanted = np.concatenate([np.full(starts[i + 1] - starts[i], i in mine) for i in range(len(split))])
    assert 0 < len(mine) < len(split) and np.array_equal(bytes_of, wanted)
    whole, found = (np.fromfile(tmp_path / name / "states.bin", dtype=np.uint8) for name in ("whole", "half"))
    assert np.array_equal(found, np.where(wanted, whole, 0))


def test_a_block_is_on_disk_before_it_is_recorded_as_done(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(READING_TOKENS, "cpu", 1100)
    events: list[str] = []
    pwrite, fsync, append = os.pwrite, os.fsync, ResumablePass.append

    def noted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def note_and_call(*arguments: object) -> object:
            events.append(name)
            return function(*arguments)

        return note_and_call

    monkeypatch.setattr(teachers.os, "pwrite", noted("write", pwrite))
    monkeypatch.setattr(teachers.os, "fsync", noted("sync", fsync))
    monkeypatch.setattr(ResumablePass, "append", noted("record", append))
    build(folders, tmp_path / "cache")
    order = [name for name, before in zip(events, [None, *events], strict=False) if name != before]
    num_blocks = len(blocks_to_read(load_split(folders.data, "train", max_length=MAX_LENGTH).lengths, CPU))
    first = order.index("write")  # before it the key of the pass is written, behind the last block the manifest
    assert order[first : first + 3 * num_blocks] == ["write", "sync", "record"] * num_blocks
    assert events.count("record") == num_blocks > 1


def test_a_cache_whose_bytes_were_lost_on_their_way_is_never_finished(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers.os, "pwrite", lambda file, data, start: len(data))
    with pytest.raises(UserError, match="does not match the teacher's states for example"):
        build(folders, tmp_path / "cache")
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_a_stale_or_damaged_cache_is_refused(folders: Folders, tmp_path: Path) -> None:
    build(folders, tmp_path / "cache")
    with pytest.raises(UserError, match="caches another teacher or other texts"):
        build(folders, tmp_path / "cache", max_length=MAX_LENGTH - 1)
    with pytest.raises(UserError, match="caches another teacher"):
        build(folders, tmp_path / "cache", "bf16")
    states = tmp_path / "cache" / "states.bin"
    content = bytearray(states.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    states.write_bytes(content)
    with pytest.raises(UserError, match="does not match the teacher's states for example"):
        build(folders, tmp_path / "cache")
    states.write_bytes(content[:-4])
    with pytest.raises(UserError, match="expected .* bytes"):
        build(folders, tmp_path / "cache")


def test_a_disk_without_room_is_noticed_before_the_pass(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"needs .* GB and .* has 0\.00 GB free"):
        build(folders, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("named", ["by-path", "."])
def test_a_folder_that_holds_something_else_is_refused_and_kept(
    folders: Folders, tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "mine"
    (theirs / "chapters").mkdir(parents=True)
    (theirs / "chapters" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(theirs)
    with pytest.raises(UserError, match="holds something other than a teacher cache"):
        build(folders, theirs if named == "by-path" else Path(named))
    assert [path.name for path in theirs.rglob("*")] == ["chapters", "thesis.txt"]
    assert (theirs / "chapters" / "thesis.txt").read_text() == "years of work"


def test_a_cache_verifies_where_some_numbers_were_rounded_far_apart_and_not_where_rows_are_swapped(
    folders: Folders, tmp_path: Path
) -> None:
    cached = build(folders, tmp_path / "cache", "bf16")
    path, split = tmp_path / "cache" / "states.bin", load_split(folders.data, "train", max_length=MAX_LENGTH)
    kept = np.fromfile(path, dtype=np.uint16).reshape(split.num_labels.sum(), -1)
    rows = torch.from_numpy(kept.copy()).view(torch.bfloat16)[: split.num_labels[0]]
    assert torch.equal(rows, cached.states(split.batch([0])))  # the first example is one of those that are read again
    rounded = rows.clone()
    rounded.view(-1)[[1, 40]] += 0.1
    assert rows.float().std() < 0.2 and rows.numel() > 200  # two of them are far apart, the others are the same
    apart = kept.copy()
    apart[: len(rounded)] = rounded.view(torch.uint16).numpy()
    apart.tofile(path)
    build(folders, tmp_path / "cache", "bf16")
    swapped = kept.copy()
    swapped[[0, 1]] = kept[[1, 0]]
    swapped.tofile(path)
    with pytest.raises(UserError, match="does not match the teacher's states for example"):
        build(folders, tmp_path / "cache", "bf16")


def test_a_second_run_waits_for_the_one_that_makes_the_cache_and_uses_it(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folders, tmp_path / "first")
    said: list[str] = []
    (tmp_path / "cache").mkdir()
    with open(tmp_path / "cache" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def finish() -> None:
            for name in ("states.bin", "manifest.json"):
                shutil.copy(tmp_path / "first" / name, tmp_path / "cache" / name)
            fcntl.flock(file, fcntl.LOCK_UN)

        def say(line: str) -> None:
            said.append(line)
            if "waiting" in line:
                threading.Timer(0.3, finish).start()

        monkeypatch.setattr(teachers, "say", say)
        build(folders, tmp_path / "cache")
    assert said == [
        f"another run is using the teacher cache in {tmp_path / 'cache'}; waiting for it",
        f"teacher states from {tmp_path / 'cache'}",
    ]


def test_a_cache_that_is_made_is_used_where_the_disk_has_no_room_for_another(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = replace(folders, data=tmp_path / "data")
    shutil.copytree(folders.data, mine.data, ignore=shutil.ignore_patterns("teacher-cache"))
    flags = ["--difficulty", "length", "--num-stages", 2, "--num-dev", 0]
    train_until_stage(train_arguments(mine, tmp_path / "out", *flags), 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    result = call(train, train_arguments(mine, tmp_path / "out", *flags))
    assert result.status == 0 and "teacher states from" in result.output, result.output
    ledger = json.loads((tmp_path / "out" / "tfkl" / "seed10" / "ledger.json").read_text())
    assert ledger["teacher_forward_passes"] == 48
