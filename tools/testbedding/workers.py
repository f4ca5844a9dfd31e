"""Processes that share work, and end at once when this one is told to."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import util
from typing import Any

from pocl.common.errors import Interrupted

Work = tuple[Any, ...]  # a function and what it is given


@contextmanager
def workers(jobs: int, begin: Callable[[], object]) -> Iterator[Callable[[Sequence[Work]], Iterator[Any]]]:
    """What does work in ``jobs`` processes, which call ``begin`` first, and gives each result as it comes.

    A KeyboardInterrupt ends them: each leaves what it is doing, by way of its ``finally``.
    """
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(begin,)
    )
    try:
        yield lambda phase: (task.result() for task in as_completed([pool.submit(_do, *one) for one in phase]))
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(begin: Callable[[], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))
    begin()


def _do(function: Callable[..., Any], *given: Any) -> Any:
    try:
        return function(*given)
    except (SystemExit, Interrupted):
        util._exit_function()  # else what libraries share between processes is reported as leaked
        os._exit(130)  # the pool would go on with the next
