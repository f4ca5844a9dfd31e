"""Commands in processes of their own, forked from one that has imported everything, and ended by SIGKILL.

A moment to kill at is a time, or the n-th time that the command touches a file of its folder: all that is written is
cut off sooner or later, before and behind each rename.
"""

import contextlib
import importlib
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from tests.faults.cases import CASES, Case
from tests.runs import Folders

_PATIENCE = 300.0  # seconds that a command may take
_WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    left: dict[str, str]
    seconds: float
    touches: int  # of files in its folder, by rank 0


def import_everything() -> None:
    """What takes seconds, once, so that no killed process has to."""
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    for name in ("deepspeed", "peft", "torch.utils.tensorboard", *{case.script for case in CASES.values()}):
        importlib.import_module(name)


def whole_run(case: Case, folders: Folders, folder: Path) -> Whole:
    """Run the command once from start to end.  Raises RuntimeError where it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    statuses = _wait(_start(case, folders, folder, count_touches=True), _PATIENCE)
    if any(statuses):
        raise RuntimeError(f"{case.title} does not even run whole:\n{_output(folder)}")
    return Whole(case.left(folder), time.monotonic() - started, int((folder / "touches").read_text()))


def killed_run(
    case: Case, folders: Folders, folder: Path, whole: Whole, *, kills: int, chance: random.Random
) -> tuple[int, dict[str, str] | str]:
    """Start, kill, start again …, at last leave it alone -> (how often it was killed, what it left or a complaint)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = 0
    while made < kills:
        by_touch = chance.random() < 0.5
        touch = chance.randint(1, whole.touches) if by_touch else 0
        seconds = _PATIENCE if by_touch else chance.uniform(0.0, whole.seconds)
        pids = _start(case, folders, folder, kill_at_touch=touch)
        statuses = _wait(pids, seconds, victim=chance.randrange(case.num_ranks))
        if not any(statuses):
            break  # it came to its end
        if -signal.SIGKILL not in statuses:
            return made, f"ended with {statuses} by itself:\n{_output(folder)}"
        made += 1
    statuses = _wait(_start(case, folders, folder), _PATIENCE)
    if any(statuses):
        return made, f"did not go on ({statuses}):\n{_output(folder)}"
    return made, case.left(folder)


def _start(
    case: Case, folders: Folders, folder: Path, *, count_touches: bool = False, kill_at_touch: int = 0
) -> list[int]:
    """Fork a process for each rank -> their ids."""
    module = importlib.import_module(case.script)
    arguments = case.arguments(folders, folder)
    port = _free_port()
    pids = []
    for rank in range(case.num_ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        status = 70
        try:
            with open(folder / f"output-{rank}", "ab", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            _describe_rank(rank, case.num_ranks, port)
            touches = _Touches(folder, kill_at_touch if rank == 0 else 0)
            sys.addaudithook(touches.note)
            status = _call(module, arguments)
            touches.over = True
            if count_touches and rank == 0:
                (folder / "touches").write_text(str(touches.count))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pids


def _call(module: object, arguments: Sequence[str]) -> int:
    from pocl.cli.process import run_main

    argv = [str(module.__file__), *arguments]  # type: ignore[attr-defined]
    with mock.patch.object(sys, "argv", argv):
        try:
            run_main(module.main)  # type: ignore[attr-defined]
        except SystemExit as exit_:
            return int(exit_.code or 0)
    return 0


def _describe_rank(rank: int, num_ranks: int, port: int) -> None:
    """What a launcher puts into the environment."""
    if num_ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            LOCAL_SIZE=str(num_ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )


class _Touches:
    """Counts how often files of a folder are touched, and ends the process at the n-th time."""

    def __init__(self, folder: Path, kill_at: int) -> None:
        self.folder, self.kill_at, self.count, self.over = str(folder), kill_at, 0, False

    def note(self, event: str, values: tuple[object, ...]) -> None:
        if self.over or event not in _WRITES or not str(values[0]).startswith(self.folder):
            return
        if str(values[0]).rsplit("/", 1)[-1].startswith("output-"):
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _wait(pids: Sequence[int], seconds: float, *, victim: int = 0) -> list[int]:
    """Wait for the processes, kill ``victim`` at that time, and the others where one has ended badly -> statuses.

    A status is the exit status, or minus the signal's number.
    """
    deadline, statuses = time.monotonic() + seconds, {}
    while len(statuses) < len(pids):
        for i, pid in enumerate(pids):
            if i not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[i] = os.waitstatus_to_exitcode(status)
        if any(statuses.values()):
            deadline = min(deadline, time.monotonic() + 0.5)  # as a launcher does, soon after
            victims = [pid for i, pid in enumerate(pids) if i not in statuses]
        else:
            victims = [pids[victim]]
        if time.monotonic() >= deadline:
            for pid in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[i] for i in range(len(pids))]


def _output(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("output-*")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
