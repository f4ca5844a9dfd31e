"""What tools/benchmark.py reads off the machine: time, the rates of a large product and a large copy."""

import ctypes
import platform
import time
from collections.abc import Callable

import torch

_TRIES = 6  # of a rate; the best counts


class Stopwatch:
    """The seconds that were spent inside ``with`` blocks, what they started on the GPU included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> "Stopwatch":
        self.seconds -= self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measured_rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """(FLOP/s of a large matrix product, bytes/s that a large copy reads and writes)."""
    size, count = (8192, 2**28) if device.type == "cuda" else (1536, 2**26)
    factor = torch.randn(size, size, dtype=dtype, device=device)
    source = torch.zeros(count, dtype=dtype, device=device)
    target = torch.empty_like(source)
    multiplying = _best_of(lambda: torch.mm(factor, factor), device)
    copying = _best_of(lambda: target.copy_(source), device)
    return 2 * size**3 / multiplying, 2 * source.nbytes / copying


def _best_of(call: Callable[[], object], device: torch.device) -> float:
    found = []
    for _ in range(_TRIES):
        with Stopwatch(device) as taken:
            call()
        found.append(taken.seconds)
    return min(found)


def keep_freed_memory() -> None:
    """What scripts/common.sh asks of glibc for every run on the CPU: freed memory is kept, not faulted in again.

    It is for both sides: the reference, which frees the most, gains the most by it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_max, trim_threshold = ctypes.CDLL(None), -4, -1  # the names of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
