"""SIGTERM, Ctrl-C and Slurm's warning (SIGUSR1) while a run trains: finish the step, save, leave."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Optional

from pocl import distributed

# A launcher passes a signal on, some of them twice within a second or two: those are one request.
_DUPLICATE_SIGNAL_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """A signal asked some rank to stop, and every rank has left the pass over examples that it was in."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"asked to stop by signal {signum}")
        self.signum = signum


class Interrupt:
    """A context in which the first of these signals sets ``signum``; a later second one ends the process at once."""

    current: Optional["Interrupt"] = None  # the context that the process is in

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        Interrupt.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Interrupt.current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > _DUPLICATE_SIGNAL_SECONDS:
            os._exit(128 + signum)


def requested() -> int:
    """The signal that asked this rank to stop, 0 for none; a pass over many blocks looks here between two of them."""
    return Interrupt.current.signum if Interrupt.current else 0


def stop_if_requested() -> None:
    """Raise StopRequested on every rank where any was asked to stop. Every rank must come here, after its blocks."""
    if Interrupt.current is None:
        return
    signum = max(distributed.gather_by_id({distributed.rank(): requested()}).values())
    if signum:
        raise StopRequested(signum)
