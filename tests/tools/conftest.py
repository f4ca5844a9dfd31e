"""What tests of the tools share."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def ends_on_sigterm() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Send SIGTERM to this process once a condition holds; its handler is put back behind the test."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def once(condition: Callable[[], object]) -> None:
        def watch() -> None:
            while not condition():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    yield once
    signal.signal(signal.SIGTERM, before)
