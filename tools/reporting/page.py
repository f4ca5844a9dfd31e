"""The page: what report.html.j2 needs, with style and script inside, so that it is one file."""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2

from pocl.difficulty.diagnostics import diagnose, summary
from pocl.evaluation.metrics import METRICS, SHOWN
from tools.reporting import commands, facts, panels
from tools.reporting.browse import Shown, answers, samples
from tools.reporting.data import Entry, Ranking
from tools.reporting.drawings import SHEET, drawing
from tools.reporting.facts import Grid
from tools.reporting.tables import Table, make_tables, notes, text_rows

HERE = Path(__file__).parent


def report(entries: Sequence[Entry], title: str, shown: Shown, *, alone: bool) -> str:
    """The page of one run (``alone``), or of a table. Its policy lets only its own script run, and nothing come in."""
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    tables = result_tables(entries, shown)
    return template().render(
        title=title,
        shown=shown,
        alone=alone,
        entries=entries,
        runs=[entry for entry in entries if entry.run],
        tables=tables,
        results=result_grids(tables),
        notes=notes(tables[0]) if tables else [],
        highest=highest(tables),
        answers=answers(entries, shown),
        policy=policy,
        style=SHEET,
        script=script,
    )


@cache
def template() -> jinja2.Template:
    """report.html.j2 with what it may call."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"slug": slug, "count": facts.count}
    environment.globals |= {"facts": facts, "panels": panels, "commands": commands, "drawing": drawing}
    environment.globals |= {"samples": samples, "diagnosis": diagnosis}
    return environment.get_template("report.html.j2")


def slug(text: str) -> str:
    """The text as an id: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def diagnosis(ranking: Ranking) -> list[str]:
    """A ranking in words."""
    return summary(diagnose(ranking.records, [])) if ranking.has_lengths else []


def result_tables(entries: Sequence[Entry], shown: Shown) -> list[Table]:
    """One table a metric of the rows that were evaluated; none where none was."""
    rows = {}
    for entry in entries:
        if entry.evaluation:
            # The run's own folder, where it can be, so that the ledgers are compared too.
            inside = entry.run and entry.evaluation == entry.run.path / "eval"
            rows[entry.name] = entry.run.path if entry.run and inside else entry.evaluation
    return make_tables(rows, SHOWN, published=shown.published, baselines=shown.baselines) if rows else []


def result_grids(tables: Sequence[Table]) -> list[Grid]:
    """The tables of the page: one a metric, or one with a line a metric where there is a single row."""
    made = [(METRICS[table.metric].name, *text_rows(table)) for table in tables]
    if made and len(made[0][2]) == 1:
        return [Grid("results", ["", *tables[0].columns], [[name, *rows[0][1:]] for name, _, rows in made])]
    return [Grid(name, head, rows) for name, head, rows in made]


def highest(tables: Sequence[Table]) -> tuple[str, str, float] | None:
    """(row, what it is over, mean) of the highest mean ROUGE-L; None where there is none."""
    column = tables[0].columns[-1] if tables else ""
    means = [(row.cells[column].mean, row.name) for row in tables[0].rows if column in row.cells] if tables else []
    return (max(means)[1], column, max(means)[0]) if means else None
