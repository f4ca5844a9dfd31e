"""How far a pass is: a bar that can be read on a narrow terminal, elsewhere a line now and then."""

import io
import logging
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from pocl.common import console
from pocl.common.console import Progressing

NOTE = "stage 1/4  T 1.00  r 0.70  loss 3.214  D 0.413  dev ROUGE-L 20.13"


@pytest.mark.parametrize(("width", "shown"), [(140, NOTE), (80, NOTE[:30]), (60, NOTE[:15])])
def test_a_bar_keeps_its_numbers_whatever_the_width(width: int, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=screen, force_terminal=True, width=width))
    with Progressing("training", 352, 100) as progress:
        progress.advance(3, NOTE)
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").strip().split("\n")[-1]
    assert re.match(r"training .* 103/352 +[-\d]+:[-\d]+:[-\d]+ +", last) and shown in last
    assert len(last) <= width


def test_without_a_terminal_a_line_comes_every_twenty_seconds_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, lines, kept = [0.0], [], logging.Handler()
    kept.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(console.LOG, "handlers", [kept])
    caplog.set_level(logging.INFO, "pocl")
    for transient in (False, True):
        with Progressing("training", 100, transient=transient) as progress:
            for _ in range(100):
                clock[0] += 3  # seconds
                progress.advance(1, "loss 3.2")
    # At each seventh of the hundred steps, after 21 s, and at the last; a transient one leaves that to the result.
    every, last = lines[:15], lines[14]
    assert every == [*lines[15:], last]
    assert every[0] == "training 7/100  4.7 min left  loss 3.2"
    assert last == "training 100/100  300 s  loss 3.2"
