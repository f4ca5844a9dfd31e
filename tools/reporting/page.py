"""The page: its parts in order, with style and script inside, so that it is one file."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pocl.evaluation.metrics import METRICS, SHOWN
from tools.reporting.answers import answers
from tools.reporting.charts import Curve, Panel, line_chart
from tools.reporting.commands import again
from tools.reporting.controls import ScoringSettings
from tools.reporting.data import Entry
from tools.reporting.difficulty import difficulty, distinct, quarters, rerankings, whose
from tools.reporting.html import Html, Node, join, note, slug, table, tag
from tools.reporting.run import curves, dev_table, figures, ledger_list, ledger_table, sentence, stage_table
from tools.reporting.samples import samples
from tools.reporting.tables import POCL, Table, make_tables, notes, text_rows

ASSETS = Path(__file__).parent
Section = tuple[str, Html]


def run_report(
    entry: Entry, title: str, limits: ScoringSettings, data_root: Path, *, published: str | None = None
) -> str:
    """The page of one run."""
    tables = result_tables([entry], published)
    sections: list[Section] = [
        ("Results", results(tables, [entry])),
        ("Curves", join(curves(entry), dev_table(entry))),
        ("Curriculum", curriculum(entry)),
    ]
    if entry.rankings:
        first, *later = entry.rankings
        sections.append(("Difficulty", difficulty(first)))
        sections.append(("Samples", samples(first, entry.texts, limits, later, "samples")))
    else:
        sections.append(("Difficulty", note("This run ranked no examples.")))
    sections += [
        ("Answers", answers([entry], limits, data_root)),
        ("Ledger", ledger_list(entry)),
        ("To repeat", again(entry, data_root)),
    ]
    return page(title, [sentence(entry)], figures(entry, headline(tables)), sections)


def table_report(
    entries: Sequence[Entry],
    title: str,
    limits: ScoringSettings,
    data_root: Path,
    *,
    published: str | None = None,
    baselines: Mapping[str, str] | None = None,
) -> str:
    """The page of a whole table; ``baselines`` are those of ``make_tables``."""
    tables = result_tables(entries, published, baselines)
    runs = [entry for entry in entries if entry.run]
    sections: list[Section] = [("Results", results(tables, entries))]
    if any(entry.dev for entry in runs):
        sections.append(("Learning", learning(runs)))
    words = note("Open a row to see its curves, stages and commands.")
    sections.append(("Rows", join(words, *(row_part(entry, data_root) for entry in entries))))
    for i, (owners, ranking) in enumerate(distinct(runs), start=1):
        texts = next((entry.texts for entry in owners if entry.texts.by_id), owners[0].texts)
        words = note("The ranking of ", whose(owners), ".")
        browse = samples(ranking, texts, limits, owners[0].rankings[1:], f"samples-{i}")
        sections.append(("Difficulty" if i == 1 else f"Difficulty {i}", join(words, difficulty(ranking), browse)))
    sections += [("Answers", answers(entries, limits, data_root)), ("Ledger", ledger_table(runs))]
    words = [f"{len(entries)} rows, {len(runs)} of them with their runs.", highest(tables)]
    return page(title, words, Html(""), sections)


def result_tables(
    entries: Sequence[Entry], published: str | None, baselines: Mapping[str, str] | None = None
) -> list[Table]:
    """One table a metric of the rows that were evaluated; none where none was."""
    rows = {}
    for entry in entries:
        if entry.evaluation:
            # The run's own folder, where it can be, so that the ledgers are compared too.
            inside = entry.run and entry.evaluation == entry.run.path / "eval"
            rows[entry.name] = entry.run.path if entry.run and inside else entry.evaluation
    return make_tables(rows, SHOWN, published=published, baselines=baselines) if rows else []


def headline(tables: Sequence[Table]) -> tuple[str, float] | None:
    """(what it is over, the mean ROUGE-L) of a table with one row."""
    cells = tables[0].rows[0].cells if tables else {}
    column = tables[0].columns[-1] if tables else ""
    return (column, cells[column].mean) if column in cells else None


def highest(tables: Sequence[Table]) -> str | None:
    """The row with the highest mean, in words; None where there is no choice."""
    if not tables or len(tables[0].rows) < 2:
        return None
    column = tables[0].columns[-1]
    means = {row.name: row.cells[column].mean for row in tables[0].rows if column in row.cells}
    best = max(means, key=lambda name: means[name], default=None)
    return f"Highest ROUGE-L ({column}): {best}, {means[best]:.2f}." if best is not None else None


def results(tables: Sequence[Table], entries: Sequence[Entry]) -> Html:
    """The tables, and the last column of the first as intervals beside each other."""
    if not tables:
        return note("Not evaluated yet: evaluate.py writes eval/summary.json.")
    parts = [one_row(tables)] if len(tables[0].rows) == 1 else [intervals(tables[0])]
    for made in tables if len(tables[0].rows) > 1 else ():
        columns, rows = text_rows(made)
        name = METRICS[made.metric].name
        head = tag("h3", name[0].upper() + name[1:])
        parts += [head, table(columns, [[row[0], *map(cell, row[1:])] for row in rows], caption=name, class_="scores")]
    parts.append(tag("ul", *(tag("li", line) for line in notes(tables[0])), class_="notes"))
    missing = [entry.name for entry in entries if not entry.evaluation]
    if missing:
        parts.append(note(f"Not evaluated: {', '.join(missing)}."))
    return join(*parts)


def one_row(tables: Sequence[Table]) -> Html:
    """The tables of a single row as one: a line a metric."""
    rows = [text_rows(made)[1][0] for made in tables]
    body = [[METRICS[made.metric].name, *map(cell, row[1:])] for made, row in zip(tables, rows, strict=True)]
    return table(["", *tables[0].columns], body, caption="results", class_="scores")


def cell(text: str) -> Html:
    """A cell of tools/make_tables.py: the mean, and smaller what stands below it."""
    mean, *below = text.split("\n")
    return join(tag("b", mean) if below else mean, *(tag("small", line) for line in below))


def intervals(made: Table) -> Html:
    """The last column of a table as a line a row: mean, 95 % interval, and the paper's figure as a ring."""
    column = made.columns[-1]
    rows = [(row.name, row.cells[column]) for row in made.rows if column in row.cells]
    if len(rows) < 2:
        return Html("")
    ends = [value for _, c in rows for value in (c.low, c.high, c.mean, c.published) if value is not None]
    low, high = min(ends), max(ends)
    low, high = max(0.0, low - 0.05 * (high - low or 1)), high + 0.05 * (high - low or 1)

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    body: list[list[Node]] = []
    for name, c in rows:
        width = f"{100 * (c.high - c.low) / (high - low):.2f}%"
        marks = [tag("span", class_="range", style=f"left:{place(c.low)};width:{width}")]
        if c.published is not None:
            marks.append(tag("span", class_="paper", style=f"left:{place(c.published)}", title=f"{c.published:.2f}"))
        marks.append(tag("span", class_="mean", style=f"left:{place(c.mean)}"))
        look = "interval pocl" if name.endswith(POCL) else "interval"
        body.append([name, f"{c.mean:.2f}", tag("span", *marks, class_=look)])
    ring = " Ring: the paper’s figure." if any(c.published is not None for _, c in rows) else ""
    words = note(f"ROUGE-L, {column}: the mean on the line of its 95 % interval.{ring}")
    ends_of_scale = tag("span", tag("span", f"{low:.1f}"), tag("span", f"{high:.1f}"), class_="ends")
    return join(words, table(["row", "mean", ends_of_scale], body, caption="intervals", class_="intervals"))


def learning(runs: Sequence[Entry]) -> Html:
    """Dev ROUGE-L of every run, a baseline and its POCL row in one panel, all panels to one scale."""
    groups: dict[str, list[Entry]] = {}
    for entry in runs:
        if entry.dev:
            groups.setdefault(entry.name.removesuffix(POCL), []).append(entry)
    top = max(record["dev_rouge_l"] for group in groups.values() for entry in group for record in entry.dev)
    charts = []
    for name, group in groups.items():
        lines = [
            Curve(
                entry.name,
                [[(record["step"], record["dev_rouge_l"]) for record in entry.dev]],
                "s0" if len(group) > 1 and not entry.name.endswith(POCL) else "s1",
                "dots",
            )
            for entry in group
        ]
        last = max(record["step"] for entry in group for record in entry.dev)
        charts.append(line_chart(Panel(name, x_range=(0, last), y_range=(0.0, top)), lines))
    return join(
        note("ROUGE-L on the dev prompts, 0 to 100; one scale for all panels."), tag("div", *charts, class_="charts")
    )


def curriculum(entry: Entry) -> Html:
    """The stages, what was ranked again, and how each quarter fared."""
    head = tag("h3", "Easy and hard examples as the curriculum goes on")
    return join(tag("h3", "Stages"), stage_table(entry), rerankings(entry), head, quarters(entry))


def row_part(entry: Entry, data_root: Path) -> Html:
    """Everything about one row of a table, to be opened."""
    repeat = [tag("h4", "To repeat"), again(entry, data_root)]
    said, parts = "an evaluation without its run", [note(str(entry.folder)), *repeat]
    if entry.run:
        said = f"best dev ROUGE-L {entry.best['dev_rouge_l']:.2f}" if entry.best else "no dev evaluation"
        parts = [note(sentence(entry) or str(entry.folder)), *run_parts(entry), *repeat]
    head = tag("summary", tag("h3", entry.name), " ", tag("span", said, class_="unit"))
    return tag("details", head, *parts, class_="run", id=f"row-{slug(entry.name)}")


def run_parts(entry: Entry) -> list[Html | None]:
    """What is shown of a run among others."""
    return [
        figures(entry, None),
        tag("h4", "Curves"),
        curves(entry),
        dev_table(entry),
        tag("h4", "Stages"),
        stage_table(entry),
        rerankings(entry),
        tag("h4", "Easy and hard examples"),
        quarters(entry),
    ]


def page(title: str, words: Sequence[str | None], top: Html, sections: Sequence[Section]) -> str:
    """The whole page. Its policy lets no script run but its own, and nothing be fetched."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · POCL report"),
        Html(f"<style>{style}</style><script>{script}</script>"),
    )
    links = [tag("a", name, href=f"#{slug(name)}") for name, _ in sections]
    header = tag(
        "header",
        tag("p", "POCL report", class_="kicker"),
        tag("h1", title),
        *(tag("p", line, class_="lead") for line in words if line),
        top,
    )
    parts = [tag("section", tag("h2", name), body, id=slug(name)) for name, body in sections]
    body = tag("body", header, tag("nav", *links, aria_label="ResumablePass of the page"), tag("main", *parts))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"
