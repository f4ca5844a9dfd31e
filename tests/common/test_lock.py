"""The lock of a folder: one process at a time, released however that ends, and nothing left behind."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pocl.common.errors import UserError
from pocl.common.lock import LOCK, FolderLock, locked_folder
from tests.tiny import ROOT

HOLD = """
import sys, time, pathlib
from pocl.common.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
print(lock.take() or "taken", flush=True)
time.sleep(60)
"""


def test_one_at_a_time_and_the_other_is_told_who(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.take() is None
    assert str(second.take()).startswith("process ")
    first.release()
    assert second.take() is None
    second.release()


def test_a_process_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert other.stdout and other.stdout.readline() == "taken\n"
        with FolderLock(tmp_path) as lock:
            assert str(lock.take()).startswith(f"process {other.pid} on ")
            other.kill()
            other.wait()
            assert lock.take() is None
    finally:
        other.kill()
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_and_not_used_is_removed(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b") as lock:
        assert lock.take() is None and [path.name for path in (tmp_path / "a" / "b").iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "a" / "b") as lock:
        assert lock.take() is None
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_who_never_had_it_removes_nothing(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as first:
        assert first.take() is None
        with FolderLock(tmp_path) as second:
            assert second.take()
        assert (tmp_path / LOCK).is_file()


def test_many_who_wait_come_in_one_by_one(tmp_path: Path) -> None:
    inside, seen = 0, []

    def visit() -> None:
        nonlocal inside
        with locked_folder(tmp_path / "folder"):
            inside += 1
            seen.append(inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=visit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 8


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/folder"), locked_folder(tmp_path / "file" / "folder"):
        pass
