"""The teacher as a source of hidden states at response positions, and a head that turns them into logits.

Online, the teacher's trunk reads every batch. Cached, it has read every training text once and is gone: the hidden
states after its final norm are in one memory-mapped file in the dtype that it computes in, and only its head is kept.
The head gives the full distribution at any temperature, so the cache is exact; logits would be far larger.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.common import distributed
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import read_json, write_json
from pocl.common.lock import LOCK, FolderLock
from pocl.common.resumable_pass import ResumablePass
from pocl.data.batch import Batch
from pocl.data.blocks import blocks_to_read
from pocl.data.dataset import Split
from pocl.losses.head import Head, aligned
from pocl.models.offload import place_head
from pocl.models.states import make_head, response_states

# The file's elements as numpy dtypes; numpy has no bfloat16.
_STORAGE = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16, torch.float64: np.float64}
_SECONDS_BETWEEN_TRIES = 2.0
_NUM_VERIFIED = 8  # examples that are recomputed when a finished cache is opened


class TeacherSource(Protocol):
    """What the training step needs of a teacher."""

    head: Head
    online: bool  # whether ``states`` runs the teacher's trunk
    device: torch.device
    fingerprint: str  # of the teacher's weights

    def states(self, batch: Batch) -> Tensor:
        """The hidden states after the final norm at the batch's response positions, in order.  -> [N, H]."""
        ...


class OnlineTeacher:
    """The teacher model itself, frozen, run on every batch."""

    online = True

    def __init__(
        self, model: PreTrainedModel, device: torch.device, *, fingerprint: str, vocab_size: int | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.head: Head = aligned(make_head(model, vocab_size))
        self.device, self.fingerprint = device, fingerprint

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """See TeacherSource."""
        return response_states(self.model, batch)


class CachedTeacher:
    """The states of a training split on disk, and the teacher's head; the trunk is not kept."""

    online = False

    def __init__(
        self,
        folder: Path,
        split: Split,
        model: PreTrainedModel,
        device: torch.device,
        *,
        fingerprint: str,
        vocab_size: int | None = None,
    ) -> None:
        place_head(model, device)
        self.head: Head = aligned(make_head(model.eval().requires_grad_(False), vocab_size))
        self.dtype, self.device, self.fingerprint = model.dtype, device, fingerprint
        self._states = _open(folder, split, model)
        starts = _starts(split)
        self._rows = {int(i): (starts[p], starts[p + 1]) for p, i in enumerate(split.ids)}

    def states(self, batch: Batch) -> Tensor:
        """See TeacherSource.  Raises KeyError for an example that is not in the split."""
        device = batch.input_ids.device
        rows = torch.empty(
            len(batch.response_positions), self._states.shape[1], dtype=self.dtype, pin_memory=device.type == "cuda"
        )
        spans = [self._rows[i] for i in batch.example_ids.tolist()]
        np.concatenate([self._states[start:stop] for start, stop in spans], out=_to_numpy(rows))
        return rows.to(device, non_blocking=True)


def cache_bytes(split: Split, model: PreTrainedModel) -> int:
    """The size of a split's cache: response tokens times hidden size times bytes per element."""
    return int(split.num_labels.sum()) * _width(model) * model.dtype.itemsize


def cache_format(model: PreTrainedModel) -> dict[str, Any]:
    """What a cache's manifest says of its elements."""
    return {"dtype": str(model.dtype), "width": _width(model)}


def cached_teacher(
    model: PreTrainedModel,
    split: Split,
    folder: Path,
    device: torch.device,
    *,
    key: Mapping[str, Any],
    vocab_size: int | None,
) -> CachedTeacher:
    """The teacher with its cache in ``folder``, which is built, completed or verified first, over all ranks.

    The model runs on ``device`` (``place`` in pocl/models/offload.py); afterwards only its head is left there.
    ``key`` says what the states depend on besides the model's dtype (weights under "teacher", texts, limits).  Raises
    UserError if the folder holds a cache of something else or fails verification, or the disk has no room.
    """
    fingerprint = key["teacher"]
    key = json.loads(json.dumps(dict(key) | cache_format(model)))
    manifest = folder / "manifest.json"
    with _alone(folder):
        if distributed.broadcast(manifest.is_file() and (folder / "states.bin").is_file()):
            if read_json(manifest) != key:
                raise UserError(
                    f"{folder} caches another teacher or other texts; give another `teacher_cache`, or delete it"
                )
            _verify(folder, split, model, device)
            say(f"teacher states from {folder}")
        else:
            _build(folder, split, model, device, key)
    return CachedTeacher(folder, split, model, device, fingerprint=fingerprint, vocab_size=vocab_size)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One run at a time builds the cache; another that needs it waits here, and finds it finished.

    Raises UserError if the folder holds something else.
    """
    with FolderLock(folder) as lock:
        said = False
        # Polling, not one long wait: the other ranks would time out on a rank that is silent for hours.
        while distributed.broadcast(_taken(lock) if distributed.is_main() else None):
            if not said:
                say(f"another run is using the teacher cache in {folder}; waiting for it")
            said = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
        yield


def _taken(lock: FolderLock) -> str | None:
    """Take the lock -> None, or who has it."""
    held = {path.name for path in lock.folder.iterdir()} if lock.folder.is_dir() else set()
    if held - {LOCK, "manifest.json"} and "states.bin" not in held:
        raise UserError(
            f"{lock.folder} holds something other than a teacher cache; give `teacher_cache` another folder"
        )
    with suppress(OSError):  # a finished cache may be read only; _prepare reports the others
        return lock.take()
    return None


def _build(folder: Path, split: Split, model: PreTrainedModel, device: torch.device, key: Mapping[str, Any]) -> None:
    """Run the trunk over every training text once; an interrupted pass resumes with the missing blocks."""
    needed = cache_bytes(split, model)
    with distributed.main_first():
        if distributed.is_main():
            _prepare(folder, key, needed)
    say(f"caching the teacher's states of {len(split)} examples: {needed / 1e9:.2f} GB in {folder}")
    first_bytes = _starts(split) * _width(model) * model.dtype.itemsize

    def read(block: np.ndarray) -> list[dict[str, int]]:
        rows = response_states(model, split.batch(block).to(device)).cpu()
        for position, part in zip(block, rows.split(split.num_labels[block].tolist()), strict=True):
            _write_at(file, _to_numpy(part).tobytes(), int(first_bytes[position]))
        os.fsync(file)  # before the block is recorded as done: a resumed pass trusts the record
        return [{"id": int(i)} for i in split.ids[block]]

    with _for_writing(folder, split, model) as file, ResumablePass(folder / "done", key) as done, torch.no_grad():
        done.fill(blocks_to_read(split.lengths, device), split.ids, read, title="caching")
    distributed.barrier()
    _verify(folder, split, model, device)  # including what other ranks wrote, before anyone trusts the cache
    distributed.barrier()
    if distributed.is_main():
        write_json(folder / "manifest.json", key)
        shutil.rmtree(folder / "done")
    distributed.barrier()


@contextmanager
def _for_writing(folder: Path, split: Split, model: PreTrainedModel) -> Iterator[int]:
    """A file descriptor of the states file.

    Not a memory map: neighbouring rows belong to different ranks, and on another node a shared map writes whole pages
    back, the neighbours' old bytes with them. Write-only: then NFS reads no page beforehand, and sends only the bytes
    that were written.
    """
    file = os.open(_checked(folder, split, model), os.O_WRONLY)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, data: bytes, start: int) -> None:
    """Write all of ``data`` from byte ``start`` on; a single system call may write less."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(file, rest, start)
        rest, start = rest[written:], start + written


def _prepare(folder: Path, key: Mapping[str, Any], needed: int) -> None:
    """Create the empty file, unless an interrupted pass under the same key has left one."""
    begun = folder / "done" / "key.json"
    if begun.is_file() and read_json(begun) == key:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "done", ignore_errors=True)
        for name in ("states.bin", "manifest.json"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {folder} for the teacher cache ({error.strerror or error}); "
            f"give `teacher_cache` another folder, or off"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the teacher cache needs {needed / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB free; "
            f"give `teacher_cache` another disk, or `teacher_cache` off"
        )
    with open(folder / "states.bin", "wb") as file:
        file.truncate(needed)


def _verify(folder: Path, split: Split, model: PreTrainedModel, device: torch.device) -> None:
    """Recompute some examples.  Raises UserError if the cache holds states other than the teacher's."""
    states, starts = _open(folder, split, model), _starts(split)
    # Relative to the states' norm: in another batch kernels round differently, and a few of a million elements by far.
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-6}.get(model.dtype, 0.1)
    for position in np.linspace(0, len(split) - 1, min(_NUM_VERIFIED, len(split))).astype(int):
        with torch.no_grad():
            fresh = response_states(model, split.batch([position]).to(device)).cpu().float()
        kept = torch.from_numpy(states[starts[position] : starts[position + 1]].copy()).view(model.dtype).float()
        if not torch.norm(fresh - kept) <= tolerance * torch.norm(fresh):
            raise UserError(
                f"{folder} does not match the teacher's states for example {split.ids[position]}; delete it, or give "
                f"`teacher_cache` off"
            )


def _open(folder: Path, split: Split, model: PreTrainedModel) -> np.memmap:
    """The states file as a read-only array.  -> [all response tokens, H]."""
    path, shape = _checked(folder, split, model), (int(split.num_labels.sum()), _width(model))
    return np.memmap(path, dtype=_STORAGE[model.dtype], mode="r", shape=shape)


def _checked(folder: Path, split: Split, model: PreTrainedModel) -> Path:
    """The path of the states file.  Raises UserError if it is missing or of another size."""
    path, wanted = folder / "states.bin", cache_bytes(split, model)
    if not path.is_file() or path.stat().st_size != wanted:
        raise UserError(f"{path} is missing or does not have the expected {wanted} bytes; delete {folder}")
    return path


def _to_numpy(states: Tensor) -> np.ndarray:
    return (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()


def _starts(split: Split) -> np.ndarray:
    """Where each example's rows start, and where the last one's stop.  -> [len(split) + 1]."""
    return np.concatenate([[0], np.cumsum(split.num_labels)])


def _width(model: PreTrainedModel) -> int:
    """H: the head's input size."""
    return int(model.get_output_embeddings().weight.shape[1])
