"""One process at a time in a folder: a lock that the system releases however the process ends."""

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TextIO

from pocl.common.errors import UserError

LOCK = ".lock"  # the file in the folder, which is there while a process holds it
_SECONDS_BETWEEN_TRIES = 0.05


class FolderLock:
    """The lock of a folder; a context, at whose end it is released if it was taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: TextIO | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self) -> str | None:
        """Take it, without waiting -> None, or who has it.  Where the file system knows no locks, everybody gets it.

        Makes the folder where there is none.  Raises OSError where that is not possible.
        """
        made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:  # its last holder has just removed the folder
            return self.take()
        try:
            with suppress(BlockingIOError):
                return self._hold(file, made)
            file.seek(0)
            return file.read().strip() or "another process"
        finally:
            if file is not self._file:
                file.close()

    def _hold(self, file: TextIO, made: list[Path]) -> str | None:
        """Lock the file.  Raises BlockingIOError where another process has done so."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        if not _is_at(file, self.folder / LOCK):  # its last holder has removed it since it was opened
            return self.take()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file, self._made = file, made
        return None

    def release(self) -> None:
        """Release it; the folders that it made are removed if nothing has been put there."""
        if self._file is None:
            return
        with suppress(OSError):
            (self.folder / LOCK).unlink()
            for folder in self._made:
                folder.rmdir()
        self._file.close()
        self._file = None


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process is in the folder, and keep them out during the block.

    Raises UserError where the folder cannot be written.
    """
    with FolderLock(folder) as lock:
        try:
            while lock.take():
                time.sleep(_SECONDS_BETWEEN_TRIES)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
        yield
