"""The exceptions that end a run with one line; UserError alone means that the user can fix it."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what was given: one line saying what was found, what was expected and how to fix it.

    It names parameters in back quotes; the entry points turn these into flags (``pocl.cli.process``).
    """


class RunStopped(RuntimeError):
    """A run that cannot continue, though the command was right: one line saying where it stopped and what was kept."""

    exit_status = 1


class Interrupted(RunStopped):
    """A run that a signal ended, after it had saved everything."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signum


class RankStopped(RunStopped):
    """A RunStopped on this rank alone, which must report it itself."""


def closest(name: str, known: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` for a misspelt name, or an empty string."""
    names = list(known)
    if not name:
        return ""
    matches = [other for other in names if other.startswith(name)] or get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """The first line of a library's error, with the next where it only announces that; its type if it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return said or type(error).__name__
