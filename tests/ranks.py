"""Commands on several ranks, without the seconds that each process of a launcher needs to import torch.

The ranks are forked from a server that has imported the entry points and what a run imports beyond them.
test_interrupt and test_all_rows use the real launcher.
"""

import contextlib
import importlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

from tests.runs import Result
from tests.tiny import ROOT

_SERVER = multiprocessing.get_context("forkserver")
# DeepSpeed's engine imports its Muon, and with it torch's compiler: two seconds of each rank.
_LATE = ["deepspeed.runtime.zero.muon.muon_optimizer", "torch.utils.tensorboard", "peft"]
_SERVER.set_forkserver_preload(["train", "evaluate", *_LATE, "tests.ranks"])
_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def on_ranks(script: str, arguments: Sequence[object], *, num_ranks: int, timeout: float = 300) -> Result:
    """Run an entry point on several ranks of the CPU, as a launcher does.  The first that fails ends the others."""
    with started(script, arguments, num_ranks=num_ranks) as (ranks, log):
        status = _wait(ranks, time.monotonic() + timeout)
        return Result(status, log.read_text(encoding="utf-8") if log.exists() else "")


@contextlib.contextmanager
def started(
    script: str, arguments: Sequence[object], *, num_ranks: int
) -> Iterator[tuple[list[ForkServerProcess], Path]]:
    """The ranks of an entry point, on their way, and the file of what they print; none outlives the block."""
    port = random.SystemRandom().randint(20000, 32000)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    environment = os.environ | _CPU | shared | {"LOCAL_SIZE": str(num_ranks)}
    command = [script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, _CPU):  # the server keeps these
        log = Path(folder) / "log"
        ranks = [
            _SERVER.Process(target=_run, args=(command, environment | {"RANK": str(i), "LOCAL_RANK": str(i)}, log))
            for i in range(num_ranks)
        ]
        try:
            for rank in ranks:
                rank.start()
            yield ranks, log
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _wait(ranks: Sequence[ForkServerProcess], until: float) -> int:
    """0, or the exit status of the first rank that fails."""
    while any(rank.is_alive() for rank in ranks):
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        if failed or time.monotonic() > until:
            return failed[0] if failed else 124
        time.sleep(0.02)
    return max(abs(rank.exitcode or 0) for rank in ranks)


def _run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """One rank: what ``python COMMAND`` does."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from pocl.cli import process

    sys.argv = [str(ROOT / command[0]), *command[1:]]
    module = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
    try:
        process.run_main(module.main)
    except Exception:
        sys.excepthook(*sys.exc_info())  # torch's own, which names the rank
        sys.exit(1)
    process.stop()
    sys.stdout.flush()
