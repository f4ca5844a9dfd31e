"""A folder that a tool writes is there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pocl.common.errors import UserError
from pocl.common.files import replace_folder


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Where to write: it takes the place of ``folder`` in the end.  Raises UserError where the disk refuses."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        replace_folder(temporary, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_place(folder: Path, what: str, *marks: str) -> None:
    """Raise UserError where something else lies at --output-dir than ``what``, which holds a file like each mark."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not all(any(folder.glob(mark)) for mark in marks):
        raise UserError(f"{folder} holds something else than {what}; give another --output-dir")
