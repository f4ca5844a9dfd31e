"""What is said on rank 0: notes to the log, tables, and a progress bar (or lines, where it is no terminal)."""

import logging
import re
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from pocl.common import distributed

LOG = logging.getLogger("pocl")
CONSOLE = Console(highlight=False, soft_wrap=True)
_LINE_EVERY_SECONDS = 20.0
_WIDE = 110  # columns of a terminal that has room for a long bar beside a note
_NUMBER = re.compile(r"(about |[<>~] ?)?[+\-]?\d")  # how a cell with a number begins
_LONGEST_NUMBER = 40  # characters of such a cell, whatever stands behind the number


def say(text: str) -> None:
    """Log one line under the name ``pocl``, on rank 0 only; an entry point prints it (``pocl.cli.process``)."""
    if distributed.is_main():
        LOG.info(text)


def show_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, in_blocks: bool = False
) -> None:
    """Print a table, on rank 0 only; the first column and those of text are left-aligned, those of numbers right.

    ``in_blocks``: where it is wider than the screen, its columns go below each other, beside the first one each time.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    blocks = _blocks(columns, cells, CONSOLE.width) if in_blocks else [range(1, len(columns))]
    numbers = [i > 0 and _holds_numbers([row[i] for row in cells]) for i in range(len(columns))]
    for number, block in enumerate(blocks):
        shown = [0, *block]
        table = Table(title=title if number == 0 else None, title_justify="left", title_style="bold")
        for i in shown:
            table.add_column(columns[i], justify="right" if numbers[i] else "left", overflow="fold")
        for row in cells:
            table.add_row(*(row[i] for i in shown))
        if distributed.is_main():
            CONSOLE.print(table)


def _holds_numbers(cells: Sequence[str]) -> bool:
    """Whether most cells of a column begin with a number and none is longer than one; a dash says nothing of it."""
    filled = [cell for cell in cells if cell not in ("", "–")]
    longest = max((len(line) for cell in filled for line in cell.split("\n")), default=0)
    return longest <= _LONGEST_NUMBER and 2 * sum(map(bool, map(_NUMBER.match, filled))) >= len(filled)


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[range]:
    """The columns behind the first, in as many runs as are needed for each to fit ``width`` beside it."""
    widths = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(columns, *rows, strict=True)
    ]
    start, blocks = 1, []
    for i in range(1, len(columns)):
        # A cell has a space on both sides and a line; the table has one line more.
        if i > start and 1 + sum(widths[j] + 3 for j in (0, *range(start, i + 1))) > width:
            blocks.append(range(start, i))
            start = i
    return [*blocks, range(start, len(columns))]


class Progressing:
    """A progress bar on a terminal; a line now and then elsewhere; nothing on other ranks. A context manager.

    A ``transient`` bar goes away when it is full, and elsewhere says nothing: a line with the result follows.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, transient: bool = False) -> None:
        self.title, self.total, self.done, self.transient = title, total, done, transient
        self._started, self._last_line, self._first = time.monotonic(), time.monotonic(), done
        self._bar: Progress | None = None
        if distributed.is_main() and CONSOLE.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24 if CONSOLE.width >= _WIDE else 10),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                # What is left of the line, and cut where that is too short: it is the others that must be read.
                TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
                console=CONSOLE,
                transient=transient,
                expand=True,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "Progressing":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Move on by ``count``, with a short note that stands behind the bar."""
        self.done += count
        if self._bar:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if (self.done >= self.total and not self.transient) or now - self._last_line >= _LINE_EVERY_SECONDS:
            self._last_line = now
            say(f"{self.title} {self.done}/{self.total}  {self._time_left(now)}  {note}".rstrip())

    def _time_left(self, now: float) -> str:
        made = self.done - self._first
        if made <= 0 or self.done >= self.total:
            return f"{now - self._started:.0f} s"
        seconds = (now - self._started) / made * (self.total - self.done)
        return f"{seconds / 60:.1f} min left"
