"""Ranks, seeds, and gathering by example id. Works with one process and no launcher as well as with many."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")
Sliced = TypeVar("Sliced", list[Any], "np.ndarray[Any, Any]")


def join() -> None:
    """Join the process group that a launcher describes, or a group of one; nothing where that was done already."""
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "gloo"
    if "MASTER_ADDR" in os.environ:
        # Two hours: rank 0 may score or evaluate alone for a while, and the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest value of any rank."""
    largest = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def gather_by_id(records: Mapping[int, T]) -> dict[int, T]:
    """All ranks' records in one dict, sorted by example id, on every rank."""
    gathered: list[Any] = [dict(records)]
    if world_size() > 1:
        gathered = [None] * world_size()
        dist.all_gather_object(gathered, dict(records))
    merged = {example_id: record for part in gathered for example_id, record in part.items()}
    return dict(sorted(merged.items()))


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def my_share(blocks: Sliced) -> Sliced:
    """Every world_size-th block, starting at this rank: the blocks are the same whatever the world size."""
    return blocks[rank() :: world_size()]


def device_memory(device: torch.device) -> int:
    """Total memory in bytes of a rank's device: the GPU's, or this rank's share of the machine's on the CPU.

    The same on every rank (rank 0's), and whatever else is running: decisions based on it do not change.
    """
    if device.type == "cuda":
        return broadcast(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and path.read_text().strip().isdigit():  # a container's limit; "max" means none
            limits.append(int(path.read_text()))
    # DeepSpeed's launcher and torchrun name the number of ranks on a machine differently.
    local_ranks = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1
    return broadcast(min(limits) // int(local_ranks))


def random_state() -> dict[str, Any]:
    """This rank's random state, to be saved with a checkpoint."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
