"""Draw one run as a picture: losses, dev ROUGE-L, pool, temperature and KD ratio over optimiser steps.

python tools/plot_run.py --run results/gpt2/pocl/tfkl/seed10      # writes curves.png into the run folder
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.training.run_folder import RunFolder
from tools.reporting.data import Entry, run_title
from tools.reporting.drawings import PICTURES, picture_path, save_picture
from tools.reporting.panels import training


@dataclass(frozen=True)
class PlotOptions:
    """Which run."""

    _argument_group_name: ClassVar[str] = "picture"
    run: str = flag("run folder")
    output: str | None = flag(f"picture to write, {' '.join(PICTURES)} [default: curves.png in the run folder]", None)


def main() -> None:
    """Read metrics.jsonl, draw, save."""
    quiet_libraries()
    (what,) = parse([PlotOptions], "Draw one run as a picture.")
    run = RunFolder(Path(what.run))
    output = picture_path(what.output, run.path / "curves.png")
    entry = Entry("this run", run, None)
    if not entry.steps:
        raise UserError(f"{run.path} holds no metrics (metrics.jsonl); is it a run folder?")
    save_picture(training(entry), output, run_title(run.path), columns=2)
    say(f"picture written to {output}")


if __name__ == "__main__":
    run_main(main)
