"""SIGTERM, Ctrl-C and Slurm's warning (SIGUSR1) while a run trains: finish the step, save, leave."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Optional

from pocl.common import distributed

# Launchers forward a signal, some of them twice within a second or two: that is one request.
_DUPLICATE_SIGNAL_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """A signal asked some rank to stop, and every rank has left its pass over examples."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"asked to stop by signal {signum}")
        self.signum = signum


class Interrupt:
    """A context in which the first of these signals sets ``signum``; a second signal later ends it at once."""

    current: Optional["Interrupt"] = None  # the context that the process is in, if any

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}  # handlers

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        Interrupt.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Interrupt.current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > _DUPLICATE_SIGNAL_SECONDS:
            os._exit(128 + signum)


def requested() -> int:
    """The signal that asked this rank to stop, 0 for none; a pass over many blocks checks it between blocks."""
    return Interrupt.current.signum if Interrupt.current else 0


def stop_if_requested() -> None:
    """Raise StopRequested on every rank if any was asked to stop. Collective: call on all ranks, after the blocks."""
    if Interrupt.current is None:
        return
    signum = max(distributed.gather_by_id({distributed.rank(): requested()}).values())
    if signum:
        raise StopRequested(signum)
