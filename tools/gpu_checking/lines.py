"""What a check says: right, wrong, merely told, or not checked and why; and the time that is left for the next one."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pocl.cli.process import in_flags
from pocl.common.console import say
from pocl.common.errors import RunStopped, UserError, first_line

State = Literal["ok", "told", "not checked", "WRONG"]


class NotChecked(Exception):
    """This machine cannot check it; the text says why."""


class Wrong(Exception):
    """It was checked, and is not as it must be."""


@dataclass(frozen=True)
class Check:
    """One line of the table, to be found out."""

    name: str
    find: Callable[[], str]  # what was found; raises NotChecked or Wrong
    least: float = 1.0  # seconds without which it is not begun
    decides: bool = True  # whether its failure is one of correctness; else it is merely told


@dataclass(frozen=True)
class Line:
    """One line of the table, found out."""

    name: str
    state: State
    found: str
    seconds: float

    def record(self) -> dict[str, Any]:
        """The line as JSON has it."""
        return asdict(self) | {"seconds": round(self.seconds, 2)}


class Clock:
    """How much of the time that was given is left."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, 0 when the time is up."""
        return max(0.0, self._end - time.monotonic())


def run_checks(checks: Iterable[Check], clock: Clock) -> list[Line]:
    """Every check's line, said as soon as it is known."""
    lines = []
    for check in checks:
        started = time.monotonic()
        state, found = _outcome(check, clock)
        found = in_flags(found)
        lines.append(Line(check.name, state, found, time.monotonic() - started))
        say(f"{state:>11}  {check.name}: {found}")
    return lines


def _outcome(check: Check, clock: Clock) -> tuple[State, str]:
    if clock.left() < check.least:
        return "not checked", f"{clock.left():.0f} s are left, it takes {check.least:.0f}; give more --minutes"
    try:
        return ("ok" if check.decides else "told"), check.find()
    except NotChecked as error:
        return "not checked", str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return "not checked", f"out of memory: {first_line(error)}"
    except subprocess.TimeoutExpired:
        return "not checked", "the time was up; give more --minutes"
    except (Wrong, UserError, RunStopped) as error:
        return "WRONG", first_line(error)
    except Exception as error:  # whatever a driver or a compiler may raise is a finding, and the next check goes on
        return "WRONG", f"{type(error).__name__}: {first_line(error)}"


def run_within(
    command: Sequence[object], seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command, and end it with all that it has started once the time is up.

    Raises TimeoutExpired then. (subprocess.run would end the command alone, and wait for ranks that hold its output.)
    """
    words = [str(word) for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, **pipes, text=True, env=environment, start_new_session=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=max(1.0, seconds))
        except BaseException:  # Ctrl-C, too
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
