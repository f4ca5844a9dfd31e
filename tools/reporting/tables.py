"""The paper's tables from what runs left behind: means, bootstrap intervals, paired tests, the published figures."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pocl.common.errors import UserError
from pocl.common.files import read_json
from pocl.evaluation.metrics import METRICS
from tools.reporting.compute import ledger_of
from tools.reporting.intervals import bootstrap_intervals, holm, mean_of_sets, paired_p_values, paired_t
from tools.reporting.scores import comparable_scores

AVERAGE = "average"
POCL = " + POCL"  # a row of this ending is compared with the row of the same name without it, if nothing else is said


@dataclass(frozen=True)
class Cell:
    """One row on one set (or on the average of the sets): mean over prompts and seeds, 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    prompts: int
    seeds: int  # of sampling
    published: float | None = None


@dataclass(frozen=True)
class TableRow:
    """One row.

    ``p`` is against the row called ``baseline``, on the average of the sets, with Holm's correction for all such rows:
    of the paired t-test over training seeds where both have the same two or more, else of the paired sign-flip
    permutation test over prompts.
    """

    name: str
    cells: Mapping[str, Cell]
    p: float | None = None
    unlike: str | None = None  # how its updates differ from its baseline's
    baseline: str | None = None  # None as well where that row is not in the table
    trainings: int = 1  # runs of other training seeds that it is the mean of


@dataclass(frozen=True)
class Table:
    """A metric's table. ``columns`` are the sets, and their average where there are several.

    ``other_sizes``: set -> (prompts here, in the paper), of each set that has the paper's figure and another size.
    """

    metric: str
    columns: Sequence[str]
    rows: Sequence[TableRow]
    other_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def make_tables(
    rows: Mapping[str, Path | Sequence[Path]],
    metrics: Sequence[str],
    *,
    published: str | None = None,
    baselines: Mapping[str, str] | None = None,
) -> list[Table]:
    """One table a metric of evaluated runs, or of folders that evaluate.py wrote, in the order of ``rows``.

    A row with several folders is the mean of as many runs, one a training seed, in the same order in all rows.

    ``published`` names a table of published.json. ``baselines`` maps a row to the one that it is compared with; where
    it is not given, rows that end in " + POCL" are compared with those of the same name without it. A row has no cell
    for a set that it was not evaluated on, and then no average.
    Raises UserError where a folder holds no evaluation, or rows answered other prompts of a set.
    """
    figures = published_figures(published) if published and "rouge_l" in metrics else {}
    folders = {name: [given] if isinstance(given, Path) else list(given) for name, given in rows.items()}
    scores = comparable_scores(folders, metrics)
    sets = list(dict.fromkeys(key for row in scores[0].values() for key in row))
    if baselines is None:
        baselines = {name: name.removesuffix(POCL) for name in rows if name.endswith(POCL)}
    against = _compared(scores[0], baselines)
    # All metrics together, so that what is drawn for one serves the others.
    p_values = _p_values([_pair(of_metric, *pair) for of_metric in scores for pair in against.items()])
    samples = [_samples(row, sets) for of_metric in scores for row in of_metric.values()]
    intervals = iter(bootstrap_intervals([arrays for columns in samples for arrays in columns.values()]))
    tables = []
    for i, metric in enumerate(metrics):
        corrected = dict(zip(against, holm(p_values[i * len(against) : (i + 1) * len(against)]), strict=True))
        made = []
        for name, columns in zip(rows, samples[i * len(rows) : (i + 1) * len(rows)], strict=True):
            given = figures.get(name, {}) if metric == "rouge_l" else {}
            given = given | {AVERAGE: _mean_figure(given, sets)}
            cells = {key: _cell(arrays, next(intervals), given.get(key)) for key, arrays in columns.items()}
            baseline = against.get(name)
            unlike = _other_updates(folders[name][0], folders[baseline][0]) if baseline else None
            made.append(TableRow(name, cells, corrected.get(name), unlike, baseline, len(folders[name])))
        columns = [*sets, *([AVERAGE] if len(sets) > 1 else [])]
        tables.append(Table(metric, columns, made, _other_sizes(made, published)))
    return tables


def _p_values(pairs: Sequence[tuple[list[np.ndarray], list[np.ndarray]]]) -> list[float]:
    """p of each pair of rows: over training seeds where both have the same number, of two or more; else over prompts.

    Flips of prompts would take the luck of one training for a property of the method.
    """
    over_prompts = paired_p_values(pairs)
    return [
        paired_t(np.mean([a.mean((1, 2)) - b.mean((1, 2)) for a, b in zip(*pair, strict=True)], axis=0).tolist())[2]
        if _trainings(pair[0]) == _trainings(pair[1]) > 1
        else p
        for pair, p in zip(pairs, over_prompts, strict=True)
    ]


def _trainings(scores: Sequence[np.ndarray]) -> int:
    return scores[0].shape[0]


@cache
def _published() -> dict[str, Any]:
    return read_json(Path(__file__).with_name("published.json"))


def published_families() -> list[str]:
    """The families that published.json has figures of."""
    return list(_published())


def published_figures(name: str) -> dict[str, dict[str, float]]:
    """Row -> set -> published ROUGE-L.  Raises UserError for a table that published.json does not hold."""
    tables = _published()
    if name not in tables:
        raise UserError(f"no published figures for {name!r} (known: {', '.join(tables)})")
    sets = tables[name]["sets"]
    return {row: dict(zip(sets, values, strict=True)) for row, values in tables[name]["rows"].items()}


def _compared(scores: Mapping[str, Mapping[str, np.ndarray]], baselines: Mapping[str, str]) -> dict[str, str]:
    """Row -> baseline, in the rows' order, of the rows that were evaluated on a set of their baseline."""
    pairs = {name: baselines[name] for name in scores if baselines.get(name) in scores}
    return {name: baseline for name, baseline in pairs.items() if set(scores[name]) & set(scores[baseline])}


def _other_sizes(rows: Sequence[TableRow], published: str | None) -> dict[str, tuple[int, int]]:
    """Set -> (prompts here, prompts in the paper), where they differ beside a cell with the paper's figure."""
    here = {key: cell.prompts for row in rows for key, cell in row.cells.items() if cell.published is not None}
    known = _published()[published] if published and here else {"sets": (), "prompts": ()}
    paper = dict(zip(known["sets"], known["prompts"], strict=True))
    return {key: (count, paper[key]) for key, count in here.items() if paper.get(key, count) != count}


def _samples(row: Mapping[str, np.ndarray], sets: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Column -> what its cell is the mean of: a set's scores, or those of all sets where the row has all."""
    columns = {key: [values] for key, values in row.items()}
    return columns | ({AVERAGE: list(row.values())} if len(sets) > 1 and set(row) == set(sets) else {})


def _cell(scores: Sequence[np.ndarray], interval: tuple[float, float], published: float | None) -> Cell:
    prompts = sum(values.shape[2] for values in scores)
    return Cell(mean_of_sets(scores), *interval, prompts, max(values.shape[1] for values in scores), published)


def _mean_figure(figures: Mapping[str, float], sets: Sequence[str]) -> float | None:
    return sum(figures[key] for key in sets) / len(sets) if figures and set(sets) <= set(figures) else None


def _pair(
    scores: Mapping[str, Mapping[str, np.ndarray]], name: str, baseline: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The scores of a row and of its baseline on the sets that both have."""
    ours, theirs = scores[name], scores[baseline]
    shared = [key for key in ours if key in theirs]
    return [ours[key] for key in shared], [theirs[key] for key in shared]


def _other_updates(ours: Path, theirs: Path) -> str | None:
    """How the updates of two runs differ, by their ledgers; None where they do not, or where one has no ledger."""
    ledgers = [ledger for ledger in map(ledger_of, (ours, theirs)) if ledger]
    if len(ledgers) < 2:
        return None
    names = {"optimizer_steps": "steps", "global_batch_size": "batch"}
    one, other = ({label: ledger[key] for key, label in names.items()} for ledger in ledgers)
    if all(abs(one[label] - other[label]) <= 0.01 * max(one[label], other[label]) for label in one):
        return None
    said = [", ".join(f"{label} {value}" for label, value in row.items()) for row in (other, one)]
    return " against ".join(said)


def text_rows(table: Table, *, line: str = "\n") -> tuple[list[str], list[list[str]]]:
    """(columns, rows) to print: mean, interval and published figure in a cell, parted by ``line``."""
    compared = any(row.p is not None for row in table.rows)
    columns = [METRICS[table.metric].name, *table.columns, *(["p"] if compared else [])]
    body = []
    for row in table.rows:
        cells = [line.join(_cell_lines(row.cells.get(column))) for column in table.columns]
        p = ["" if row.p is None else _p_text(row.p)] if compared else []
        body.append([row.name + (" †" if row.unlike else ""), *cells, *p])
    return columns, body


def _cell_lines(cell: Cell | None) -> list[str]:
    if cell is None:
        return ["–"]
    lines = [f"{cell.mean:.2f}", f"{cell.low:.2f}–{cell.high:.2f}"]
    if cell.published is not None:
        lines += [f"paper {cell.published:.2f}", f"({cell.mean - cell.published:+.2f})"]
    return lines


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def notes(table: Table) -> list[str]:
    """What stands below the table."""
    several = [row for row in table.rows if row.trainings > 1]
    over = "prompts and seeds" if not several else "training seeds, prompts and sampling seeds"
    lines = [f"Below each mean: 95 % bootstrap interval over {over}."]
    if several:
        counts = dict.fromkeys(row.trainings for row in several)
        lines.append(f"A row is the mean of {' or '.join(map(str, counts))} training seeds.")
    alone = [row.name for row in table.rows if row.trainings == 1]
    if alone:
        of = "" if not several else f" of {', '.join(alone)}"
        lines.append(f"One training seed{of}: intervals and p leave out how another training would have ended.")
    against = list(dict.fromkeys(row.baseline for row in table.rows if row.p is not None))
    if against:
        other = against[0] if len(against) == 1 else f"the row of the same name without {POCL.strip()!r}"
        test = "paired t-test over training seeds" if several else "paired sign-flip permutation test"
        lines.append(f"p: {test} against {other}, with Holm's correction.")
    lines += [
        f"{name}: {here:,} prompts here and {paper:,} in the paper, whose figure is of a set of another size."
        for name, (here, paper) in table.other_sizes.items()
    ]
    lines += [
        f"† {row.baseline} and {row.name} did not see the same updates: {row.unlike}."
        for row in table.rows
        if row.unlike
    ]
    return lines


def markdown(table: Table) -> str:
    """The table and its notes as Markdown."""
    columns, rows = text_rows(table, line="<br>")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(table))]) + "\n"


def comma_separated(tables: Sequence[Table]) -> str:
    """One line a cell: row, set, metric, mean, interval, prompts, seeds, published figure, p by Holm's correction."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["row", "set", "metric", *(column.name for column in fields(Cell)), "p"])
    for table in tables:
        for row in table.rows:
            for column, cell in row.cells.items():
                p = row.p if column == table.columns[-1] else None
                writer.writerow([row.name, column, table.metric, *astuple(cell), p])
    return file.getvalue()


def latex(table: Table) -> str:
    """The table as a LaTeX tabular (packages booktabs and makecell)."""
    columns, rows = text_rows(table, line=r"\\")

    def cell(text: str) -> str:
        # Names are the user's; a backslash is the one between two lines.
        escaped = re.sub(r"[&_#$]", r"\\\g<0>", text)
        escaped = escaped.replace("–", "--").replace("†", r"$^\dagger$").replace("%", r"\%").replace("<", "$<$")
        return rf"\makecell[r]{{{escaped}}}" if r"\\" in escaped else escaped

    lines = [
        rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        r"\toprule",
        " & ".join(map(cell, columns)) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join(map(cell, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in notes(table))]) + "\n"
