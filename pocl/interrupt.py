"""SIGTERM, Ctrl-C and SLURM's warning (SIGUSR1) while a run trains: finish the step, save, leave."""

import os
import signal
import time
from types import FrameType, TracebackType

# A launcher passes a signal on, some of them twice within a second or two: that is no second wish.
_SAME_WISH_SECONDS = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupt:
    """A context in which the first of these signals sets ``signum``; a later second one ends the process at once."""

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > _SAME_WISH_SECONDS:
            os._exit(128 + signum)
