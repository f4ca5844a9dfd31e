"""Draw what a run's curriculum was made of and what it did, from difficulty.jsonl and metrics.jsonl.

python tools/plot_difficulty.py --run results/gpt2/pocl/tfkl/seed10    # writes difficulty.png into the run folder
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.difficulty.diagnostics import diagnose, summary
from pocl.training.run_folder import RunFolder
from tools.reporting.data import Entry, run_title
from tools.reporting.drawings import PICTURES, picture_path, save_picture
from tools.reporting.panels import quarters, ranking


@dataclass(frozen=True)
class PlotOptions:
    """Which run."""

    _argument_group_name: ClassVar[str] = "picture"
    run: str = flag("run folder")
    output: str | None = flag(
        f"picture to write, {' '.join(PICTURES)} [default: difficulty.png in the run folder]", None
    )


def main() -> None:
    """Read, say the numbers, draw, save."""
    quiet_libraries()
    (what,) = parse([PlotOptions], "Draw what a run's curriculum was made of and what it did.")
    run = RunFolder(Path(what.run))
    output = picture_path(what.output, run.path / "difficulty.png")
    entry, path = Entry("this run", run, None), run.first_ranking()
    if path is None:
        raise UserError(f"{run.path} holds no ranking (difficulty.jsonl); is it the folder of a run that ranked?")
    first = entry.rankings[0]
    if not first.records or not first.has_lengths:
        raise UserError(f"{path} does not say how long its examples are; rank again")
    for line in summary(diagnose(first.records, entry.metrics)):
        say(line)
    save_picture([*ranking(first), *quarters(entry)], output, run_title(run.path), columns=3)
    say(f"picture written to {output}")


if __name__ == "__main__":
    run_main(main)
