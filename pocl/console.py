"""The one place that prints, on rank 0: tables, notes, and a progress bar (or lines, where it is no terminal)."""

import time
import warnings
from collections.abc import Iterable, Sequence
from types import TracebackType

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pocl import distributed

_CONSOLE = Console(highlight=False, soft_wrap=True)
_LINE_EVERY_SECONDS = 20.0


def quiet_libraries() -> None:
    """Keep the libraries' chatter off the screen: their progress bars and warnings stand between ours."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def say(text: str) -> None:
    """Print one line, on rank 0 only."""
    if distributed.is_main():
        _CONSOLE.print(text, markup=False)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, on rank 0 only; the first column is left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    if distributed.is_main():
        _CONSOLE.print(table)


class Progressing:
    """A progress bar on a terminal; a line now and then elsewhere; nothing on other ranks. A context manager.

    A ``transient`` bar goes away when it is full, and elsewhere says nothing: a line with the result follows.
    """

    def __init__(self, title: str, total: int, done: int = 0, *, transient: bool = False) -> None:
        self.title, self.total, self.done, self.transient = title, total, done, transient
        self._started, self._last_line, self._first = time.monotonic(), time.monotonic(), done
        self._bar: Progress | None = None
        if distributed.is_main() and _CONSOLE.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=_CONSOLE,
                transient=transient,
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
