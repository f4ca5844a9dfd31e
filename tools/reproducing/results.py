"""The table at the end: the rows that were asked for on the screen, all that are there in the files."""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import ROOT
from pocl.evaluation.metrics import SHOWN
from tools.make_tables import WRITERS, show_compute, show_cross_entropy, show_tables, write_tables
from tools.reporting.tables import Table, make_tables, published_families
from tools.reproducing.steps import ReproduceOptions, Reproduction
from tools.rows import SCALES, Row, table_baselines, table_rows


def write_table(work: Reproduction, made: Sequence[Row]) -> None:
    """Print the rows that were made, and write them and the table's others that are there to table-<table>.*."""
    rows, tables = whole_table(work, made)
    names = {row.name for row in made}
    shown = [replace(table, rows=[row for row in table.rows if row.name in names]) for table in tables]
    show_tables(shown, f"{work.what.table} table")
    made_rows = {name: folders for name, folders in rows.items() if name in names}
    show_cross_entropy(made_rows)
    show_compute(made_rows)
    earlier = f", with {len(rows) - len(names)} earlier row(s)" if len(rows) > len(names) else ""
    for ending in WRITERS:
        path = work.results / f"table-{work.what.table}{ending}"
        write_tables(tables, path)
        say(f"written to {path}{earlier}")


def whole_table(work: Reproduction, made: Sequence[Row]) -> tuple[dict[str, list[Path]], list[Table]]:
    """(the rows with their folders, the tables), without the earlier rows where these answered other prompts."""
    rows, baselines = rows_that_are_there(work, made), table_baselines(work.what.table)
    alone = {row.name: work.evaluation_folders(row) for row in made}
    try:
        return rows, make_tables(rows, SHOWN, published=published(work, rows), baselines=baselines)
    except UserError as error:
        if rows.keys() == alone.keys():
            raise
        say(f"earlier rows are left out: {error}")
        return alone, make_tables(alone, SHOWN, published=published(work, alone), baselines=baselines)


def rows_that_are_there(work: Reproduction, made: Sequence[Row]) -> dict[str, list[Path]]:
    """Row -> evaluation folders, one a training seed, of the rows that were made and of earlier ones.

    Those were evaluated before on the same models. They are in the table's order. A row that was trained and
    evaluated by hand, without a note, is taken as it is.
    """
    found = {}
    for row in table_rows(work.what.table, matched=work.matched):
        folders = work.evaluation_folders(row)
        there = all((folder / "summary.json").is_file() for folder in folders)
        if row in made or (there and on_the_same_models(work, row)):
            found[row.name] = folders
    return found


def on_the_same_models(work: Reproduction, row: Row) -> bool:
    """Whether the commands that are noted beside a row have the data and models of this table."""
    return all(models_of(noted) == models_of(step.line()) for step in work.steps_of(row) if (noted := step.noted()))


def models_of(line: str) -> dict[str, str]:
    """The data and models that a step's line names."""
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in words[: words.index("bash")])
    return {name: value for name, value in settings.items() if name not in ("MODEL", "MATCHED", "ROW")}


def published(work: Reproduction, rows: Mapping[str, Sequence[Path]]) -> str | None:
    """The family whose published figures belong beside the cells; None, and a line that says why, for none."""
    if work.what.table != "main" or work.what.family not in published_families():
        return None
    different = unpublished(work)
    if not different:
        of_table = [row for row in table_rows("main", matched=work.matched) if row.name in rows]
        others = [row.name for row in of_table if not all(step.is_done() for step in work.steps_of(row))]
        different = [f"earlier rows ({', '.join(others)})"] if others else []
    if different:
        say(f"the paper's figures are left out: {', '.join(different)} made other runs than the paper's")
    if work.matched and not work.what.matched:
        say("so the KD series has POCL's batch, rate and updates (--matched 0: its own)")
    return None if different else work.what.family


def unpublished(work: Reproduction) -> list[str]:
    """What keeps the runs from the setting of the paper's main table, by the names of flags and variables."""
    what = work.what
    differs = {
        "--scale": what.scale != "full",
        "--data": what.data != ReproduceOptions.data,
        "--seeds": set(what.seeds or work.scale.seeds) != set(SCALES["full"].seeds),
        "--train-seed": what.train_seed != ReproduceOptions.train_seed,
        "--train-seeds": work.train_seeds != [ReproduceOptions.train_seed],
        "--matched": what.matched,
        "flags of train.py": bool(work.train_flags),
        "flags of evaluate.py": bool(work.evaluate_flags),
    }
    differs |= {name: bool(os.environ.get(name)) for name in ("STUDENT", "TEACHER_BASE", "TOKENIZER")}
    found = [name for name, differing in differs.items() if differing]
    if not found and Path(what.teacher).resolve() != usual_teacher(what.family, work.base):
        found.append("TEACHER")
    return found


def usual_teacher(family: str, base: Path) -> Path | None:
    """The teacher that a family's scripts take where the environment names none, by a command that one prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TEACHER"} | {"DRY_RUN": "1"}
    script = ROOT / "scripts" / family / "kd" / "train.sh"
    printed = subprocess.run(["bash", str(script), str(base)], capture_output=True, text=True, env=environment)
    words = shlex.split(printed.stdout)
    return Path(words[words.index("--teacher") + 1]).resolve() if "--teacher" in words else None
