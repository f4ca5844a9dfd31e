"""Work that is done block by block over all ranks, and resumes after an interruption on any number of ranks."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from pocl.common import distributed
from pocl.common.console import Progressing
from pocl.common.errors import RunStopped
from pocl.common.files import read_json, read_lines, write_json
from pocl.common.interrupt import requested, stop_if_requested


class ResumablePass:
    """Records with an ``id``, made block by block and kept in a folder: one file per rank, appended to.

    ``records`` holds the results of earlier, interrupted passes under the same ``key``, by id; records made under
    another key (model, data, limits) are dropped. Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self.records = _kept(folder, json.loads(json.dumps(key))) if folder else {}
        self._path = folder / f"{distributed.rank()}.jsonl" if folder else None
        self._file: TextIO | None = None

    def __enter__(self) -> "ResumablePass":
        if self._path:
            _drop_cut_line(self._path)
            self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the records of one finished block."""
        block = {record["id"]: dict(record) for record in records}
        self.records |= block
        if self._file:
            self._file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in block.values()))
            self._file.flush()

    def fill(
        self,
        blocks: Sequence[np.ndarray],
        ids: np.ndarray,
        work: Callable[[np.ndarray], Iterable[Mapping[str, Any]]],
        *,
        title: str,
    ) -> dict[int, dict[str, Any]]:
        """Do ``work`` on the blocks whose examples have no record yet, with a bar -> all records by id, on every rank.

        ``blocks`` hold positions in ``ids`` [N], the example ids; ``work`` returns one record per example of a block.
        Raises StopRequested on every rank if any received a signal (finished work is kept), and RunStopped if an
        example has no record in the end.
        """
        todo = [block for block in blocks if not all(int(ids[i]) in self.records for i in block)]
        with Progressing(title, len(blocks), len(blocks) - len(todo)) as progress:
            for block in distributed.my_share(todo):
                self.append(work(block))
                progress.advance(min(distributed.world_size(), len(blocks) - progress.done))
                if requested():
                    break
        stop_if_requested()
        records = distributed.gather_by_id(self.records)
        missing = [i for i in ids.tolist() if i not in records]
        if missing:
            raise RunStopped(f"{title}: {len(missing)} of {len(ids)} examples were left out, e.g. {missing[:5]}")
        return records


def _kept(folder: Path, key: Any) -> dict[int, dict[str, Any]]:
    """The records of earlier passes by id, on every rank as rank 0 sees them; the folder is ready afterwards.

    Another node may not see the files yet, and all must agree on what is left to do.
    """
    records: dict[int, dict[str, Any]] = {}
    with distributed.main_first():
        if distributed.is_main():
            key_path = folder / "key.json"
            if key_path.is_file() and read_json(key_path) != key:
                shutil.rmtree(folder)
            if not key_path.is_file():
                write_json(key_path, key)
            paths = sorted(folder.glob("*.jsonl"))
            records = {record["id"]: record for path in paths for record in read_lines(path)}
    return distributed.broadcast(records)


def _drop_cut_line(path: Path) -> None:
    """Drop a last line that a crash left incomplete: appended records must start on a new line."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
