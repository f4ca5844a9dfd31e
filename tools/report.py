"""Write one HTML page about a run, or about a whole table: results, curves, samples, answers, ledger, commands.

python tools/report.py --run results/gpt2/pocl/tfkl/seed10       # writes report.html into the run folder
python tools/report.py --results results/gpt2 --published gpt2    # the rows that tools/make_tables.py finds
python tools/report.py --rows "SFT=results/a" "POCL=results/b" "POCL=results/eval-of-b" --output report.html

The page needs no network and no other file. A name that is given twice has its run in one folder and its evaluation
in another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import write_text
from tools.make_tables import evaluated_rows, named_folders
from tools.reporting.browse import Shown
from tools.reporting.data import Entry, open_entry, run_title
from tools.reporting.page import report
from tools.reporting.tables import published_figures
from tools.rows import TABLES, table_baselines, table_rows


@dataclass(frozen=True)
class ReportOptions:
    """Which runs, and how much of them."""

    _argument_group_name: ClassVar[str] = "report"
    run: str | None = flag("run folder: a report of this run", None)
    results: str | None = flag("results folder of a family: a report of the rows of --table evaluated there", None)
    rows: list[str] | None = flag("NAME=FOLDER, one a row: a run folder, or a folder that evaluate.py wrote", None)
    table: str = flag(f"which rows to look for in --results: {', '.join(TABLES)}", "main", known=TABLES)
    seed: int = flag("seed of the runs in --results", 10)
    matched: bool = flag("take the KD series that was trained with MATCHED=1", False)
    published: str | None = flag("put the paper's figures for this family beside the cells (gpt2)", None)
    data_root: str = flag("folder that holds the evaluation sets", "data")
    title: str | None = flag("title of the page [default: the folder's]", None)
    num_samples: int = flag("training examples shown from each end of a ranking [examples]", 200, at_least=0)
    num_answers: int = flag("prompts of each evaluation set whose answers are shown [prompts]", 40, at_least=0)
    num_characters: int = flag("a longer text is cut here [characters]", 800, above=0)
    output: str | None = flag("page to write [default: report.html in --run or --results, or here]", None)

    def check(self) -> None:
        """Raise UserError for options that cannot work together, and for figures that are not known."""
        if sum(value is not None for value in (self.run, self.results, self.rows)) != 1:
            raise UserError("give one of --run FOLDER, --results FOLDER and --rows NAME=FOLDER ...")
        if self.published:
            published_figures(self.published)


def main() -> None:
    """Gather, build, write."""
    quiet_libraries()
    (what,) = parse([ReportOptions], "Write one HTML page about a run, or about a whole table.")
    baselines = table_baselines(what.table) if what.results else None
    limits = (what.num_samples, what.num_answers, what.num_characters)
    shown = Shown(*limits, Path(what.data_root), what.published, baselines)
    page = report(chosen_entries(what), what.title or default_title(what), shown, alone=bool(what.run))
    output = Path(what.output) if what.output else Path(what.run or what.results or ".") / "report.html"
    # A model can answer with half of a surrogate pair, which no file can hold.
    text = page.encode("utf-8", "replace").decode("utf-8")
    write_text(output, text)
    say(f"report written to {output} ({len(text.encode()) / 1e6:.1f} MB)")


def chosen_entries(what: ReportOptions) -> list[Entry]:
    """The rows, in their order.  Raises UserError where a folder holds nothing to report."""
    if what.run:
        return [open_entry(run_name(Path(what.run)), [Path(what.run)])]
    if what.results:
        found = evaluated_rows(Path(what.results), what.table, what.seed, matched=what.matched)
        return [open_entry(name, [folder]) for name, folder in found.items()]
    folders: dict[str, list[Path]] = {}
    for name, folder in named_folders(what.rows or ()):
        folders.setdefault(name, []).append(folder)
    return [open_entry(name, places) for name, places in folders.items()]


def run_name(run: Path) -> str:
    """The row of a table that the run is by its place in a family's results, else the words for a lonely one."""
    method = "/".join(run.resolve().parts[-3:-1])
    return next((row.name for table in TABLES for row in table_rows(table) if row.run == method), "this run")


def default_title(what: ReportOptions) -> str:
    """What the page is called: the end of the run's path, or the table and its family."""
    if what.results:
        return f"{Path(what.results).resolve().name}: {what.table} table"
    return run_title(Path(what.run)) if what.run else names_of(what.rows or ())


def names_of(rows: Sequence[str]) -> str:
    """The names of the rows, once each."""
    names = list(dict.fromkeys(name for name, _ in named_folders(rows)))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


if __name__ == "__main__":
    run_main(main)
