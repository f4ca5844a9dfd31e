"""The exceptions that end a run with one line; UserError alone means that the user can fix it."""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches

# Errors of a disk or a folder, wherever something is written or read.
_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENOENT", "ENOTDIR")
}


class UserError(Exception):
    """A mistake in what the user gave: one line saying what was found, what was expected and how to fix it."""


class RunStopped(Exception):
    """A run that cannot continue, though the command was right: one line saying where it stopped and what was kept."""

    exit_status = 1


class Interrupted(RunStopped):
    """A run that a signal ended, after it had saved everything."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


class RankStopped(RunStopped):
    """A RunStopped on this rank alone, which must report it itself."""


def closest(name: str, known: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` for a misspelt name, or an empty string."""
    names = list(known)
    if not name:
        return ""
    matches = [other for other in names if other.startswith(name)] or get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point: a UserError becomes one line and exit status 2, RunStopped one line and status 1.

    So does a disk that is full, read-only or gone (status 1).  POCL_DEBUG=1 in the environment adds the traceback.
    """
    try:
        main()
    except (UserError, RunStopped) as error:
        if os.environ.get("POCL_DEBUG") == "1":
            traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        if rank == "0" or isinstance(error, RankStopped):
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, Interrupted):  # all ranks stop together
            # Usually every rank hits the mistake at the same place, and rank 0 reports it: the launcher then ends
            # the others. A rank that is still alive hit it alone, for example because its machine lacks a file.
            time.sleep(3)
            print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else error.exit_status)
    except OSError as error:
        if error.errno not in _DISK or os.environ.get("POCL_DEBUG") == "1":
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"error: {what}; what was saved before is intact; the same command resumes", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("stopped; the same command resumes", file=sys.stderr, flush=True)
        sys.exit(130)
