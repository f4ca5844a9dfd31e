"""Print the results of several runs as one table, with intervals, tests and published figures; write it to files.

python tools/make_tables.py --results results/gpt2 --published gpt2 --output table.md table.csv table.tex
python tools/make_tables.py --rows "SFT=results/gpt2/sft/sft/seed10" "POCL=results/gpt2/pocl/tfkl/seed10"
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say, show_table
from pocl.common.errors import UserError
from pocl.common.files import write_text
from pocl.evaluation.metrics import METRICS, SHOWN
from tools.reporting.compute import COLUMNS, compute_rows
from tools.reporting.scores import find_evaluation, read_cross_entropies
from tools.reporting.tables import Table, comma_separated, latex, make_tables, markdown, notes, text_rows
from tools.rows import TABLES, TEACHER, table_baselines, table_rows

WRITERS: dict[str, Callable[[Sequence[Table]], str]] = {
    ".md": lambda tables: "\n".join(map(markdown, tables)),
    ".csv": comma_separated,
    ".tex": lambda tables: "\n".join(map(latex, tables)),
}


@dataclass(frozen=True)
class TableOptions:
    """Which runs."""

    _argument_group_name: ClassVar[str] = "table"
    rows: list[str] | None = flag(
        "NAME=FOLDER, one a row: a run folder, or a folder that evaluate.py wrote; a name that is given several times "
        "is one row of as many training seeds",
        None,
    )
    results: str | None = flag("results folder of a family: the rows of --table that are evaluated there", None)
    table: str = flag(f"which rows to look for in --results: {', '.join(TABLES)}", "main", known=TABLES)
    seed: int = flag("training seed of the runs in --results", 10)
    train_seeds: list[int] | None = flag("training seeds, several runs a row [default: --seed alone]", None)
    matched: bool = flag("take the KD series that was trained with MATCHED=1", False)
    published: str | None = flag("put the paper's figures for this family beside the cells (gpt2)", None)
    metrics: list[str] = flag(f"one table a metric, of {', '.join(METRICS)}", list(SHOWN), known=METRICS)
    output: list[str] | None = flag("files to write: .md, .csv or .tex", None)
    title: str = flag("title of the table", "results")

    def check(self) -> None:
        """Raise UserError for --output of no known format, and for neither or both of --rows and --results."""
        for name in self.output or ():
            if Path(name).suffix not in WRITERS:
                raise UserError(f"--output {name!r}: its ending says the format, one of {', '.join(WRITERS)}")
        if (self.rows is None) == (self.results is None):
            raise UserError("give either --rows NAME=FOLDER ... or --results FOLDER")


def main() -> None:
    """Read, print, write."""
    quiet_libraries()
    (what,) = parse([TableOptions], "Print the results of several runs as one table.")
    if what.results is not None:
        seeds = what.train_seeds or [what.seed]
        rows = rows_of_seeds(Path(what.results), what.table, seeds, matched=what.matched)
        baselines = table_baselines(what.table)
    else:
        rows, baselines = {}, None  # no table says the baselines of given names
        for name, folder in named_folders(what.rows or ()):
            rows.setdefault(name, []).append(folder)
    tables = make_tables(rows, what.metrics, published=what.published, baselines=baselines)
    show_tables(tables, what.title)
    show_cross_entropy(rows)
    show_compute(rows)
    for name in what.output or ():
        write_tables(tables, Path(name))
        say(f"written to {name}")


def named_folders(rows: Sequence[str]) -> list[tuple[str, Path]]:
    """(name, folder) of each NAME=FOLDER.  Raises UserError for what is none."""
    found = []
    for row in rows:
        name, equals, folder = row.partition("=")
        if not equals or not name or not folder:
            raise UserError(f"--rows {row!r}: give NAME=FOLDER")
        found.append((name, Path(folder)))
    return found


def evaluated_rows(results: Path, table: str, seed: int, *, matched: bool) -> dict[str, Path]:
    """The rows of a table that have an evaluation in a family's results.  Raises UserError where there is none."""
    rows = {row.name: results / row.run / f"seed{seed}" for row in table_rows(table, matched=matched)}
    if (results / "teacher-evaluation").is_dir():  # of a teacher that was not trained here
        rows = {name: results / "teacher-evaluation" if name == TEACHER.name else path for name, path in rows.items()}
    found = {name: path for name, path in rows.items() if find_evaluation(path)}
    if not found:
        raise UserError(f"{results} holds no evaluated row of the {table} table (seed {seed})")
    return found


def rows_of_seeds(results: Path, table: str, seeds: Sequence[int], *, matched: bool) -> dict[str, list[Path]]:
    """The rows of a table that are evaluated under all of these training seeds, each with its runs.

    A teacher that was not trained here is the same under each, and counts once.
    """
    found = [evaluated_rows(results, table, seed, matched=matched) for seed in seeds]
    shared = [name for name in found[0] if all(name in of_seed for of_seed in found)]
    return {name: list(dict.fromkeys(of_seed[name] for of_seed in found)) for name in shared}


def show_tables(tables: Sequence[Table], title: str) -> None:
    """Print tables, one a metric, and below them what there is to note."""
    for table in tables:
        columns, body = text_rows(table)
        show_table(f"{METRICS[table.metric].name}: {title}", columns, body, in_blocks=True)
    for line in dict.fromkeys(note for table in tables for note in notes(table)):
        say(line)


def show_cross_entropy(rows: Mapping[str, Sequence[Path]]) -> None:
    """Print how likely each row finds the references, where its evaluation says it."""
    found = read_cross_entropies(rows)
    sets = list(dict.fromkeys(key for of_row in found.values() for key in of_row))
    cells = [
        [name, *(f"{of_row[key]:.3f}" if key in of_row else "–" for key in sets)] for name, of_row in found.items()
    ]
    if cells:
        show_table("cross-entropy of the references, nats a token", ["row", *sets], cells, in_blocks=True)


def show_compute(rows: Mapping[str, Path | Sequence[Path]]) -> None:
    """Print what each row cost, where its run says it: the ranking is part of that."""
    costs = compute_rows(rows)
    if costs:
        show_table("what each row cost (of several training seeds: the first)", COLUMNS, costs)


def write_tables(tables: Sequence[Table], path: Path) -> None:
    """Write tables to a file, in the format that its ending says."""
    write_text(path, WRITERS[path.suffix](tables))


if __name__ == "__main__":
    run_main(main)
