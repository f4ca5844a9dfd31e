"""The parts of a report about difficulty: what ranked, how it is spread, lengths, categories, quarters, forgetting."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from pocl.difficulty.diagnostics import buckets, categories, diagnose, summary, tau
from pocl.difficulty.ranking import COLUMNS
from tools.reporting.charts import Curve, Panel, histogram, line_chart, scatter
from tools.reporting.data import Entry, Ranking
from tools.reporting.html import Html, Node, count, join, note, table, tag

MOST_DOTS = 1500
MOST_CATEGORIES = 24
QUARTERS = {1: "easiest quarter", 2: "second", 3: "third", 4: "hardest quarter"}
# A column's name on an axis, and what its values are multiplied by: ROUGE-L stands from 0 to 100 all over the page.
AXES = {"rouge_l": ("ROUGE-L of the student's answer, 0 to 100", 100.0)}


def difficulty(ranking: Ranking) -> Html:
    """The charts of one ranking, and its numbers in words."""
    charts = [spread(ranking, column) for column in ranking.columns]
    for one, other in itertools.islice(itertools.combinations(ranking.columns, 2), 3):
        charts.append(agreement(ranking, one, other))
    if ranking.has_lengths:
        charts += [lengths(ranking, "response"), lengths(ranking, "prompt")]
        words = tag("ul", *(tag("li", line) for line in summary(diagnose(ranking.records, []))))
    else:
        words = note("An older version wrote this ranking: it does not say how long the examples are.")
    drawn = len(range(0, len(ranking.records), _stride(ranking)))
    if drawn < len(ranking.records):
        words = join(words, note(f"Dots: {count(drawn)} of {count(len(ranking.records))} examples, evenly spaced."))
    return join(words, tag("div", *charts, class_="charts"), by_category(ranking))


def _axis(column: str) -> tuple[str, float]:
    return AXES.get(column, (COLUMNS[column].label, 1.0))


def _stride(ranking: Ranking) -> int:
    return math.ceil(len(ranking.records) / MOST_DOTS)


def by_quarter(ranking: Ranking, values: Sequence[Any]) -> dict[str, tuple[str, list[Any]]]:
    """The values of each quarter, without the missing ones: name -> (look, values)."""
    groups: dict[str, tuple[str, list[Any]]] = {}
    for quarter, value in zip(ranking.quarters, values, strict=True):
        look_and_values = groups.setdefault(QUARTERS[quarter], (f"q{quarter}", []))
        if value is not None:
            look_and_values[1].append(value)
    return groups


def spread(ranking: Ranking, column: str) -> Html:
    """How the values of a column are spread, by quarter of the ranking."""
    name, factor = _axis(column)
    values = [None if r[column] is None else factor * r[column] for r in ranking.records]
    unit = "0 to 100" if column == "rouge_l" else COLUMNS[column].unit
    wide = (0.0, 100.0) if column == "rouge_l" else None
    label = COLUMNS[column].label
    title = label[0].upper() + label[1:]
    return histogram(Panel(title, unit, x_name=name, y_name="examples", x_range=wide), by_quarter(ranking, values))


def agreement(ranking: Ranking, one: str, other: str) -> Html:
    """Two rankings against each other."""
    stride = _stride(ranking)
    pairs = [
        (r[f"{one}_rank"], r[f"{other}_rank"]) if i % stride == 0 else None for i, r in enumerate(ranking.records)
    ]
    found = tau([r[f"{one}_rank"] for r in ranking.records], [r[f"{other}_rank"] for r in ranking.records])
    said = "" if found is None else f"Kendall’s τ {found:+.2f}"
    panel = Panel("Agreement", said, x_name=f"rank by {COLUMNS[one].label}", y_name=f"rank by {COLUMNS[other].label}")
    return scatter(panel, by_quarter(ranking, pairs))


def lengths(ranking: Ranking, part: str) -> Html:
    """How long prompts or responses are, from easy to hard: dots, and the median of each tenth."""
    values = np.array([r[f"{part}_tokens"] for r in ranking.records])
    percent = 100 * np.arange(len(values)) / max(1, len(values) - 1)
    tenths = np.array_split(np.arange(len(values)), min(10, len(values)))
    medians = [(float(percent[tenth].mean()), float(np.median(values[tenth]))) for tenth in tenths]
    stride = _stride(ranking)
    points = list(zip(percent.tolist()[::stride], values.tolist()[::stride], strict=True))
    found = tau(range(len(values)), values.tolist())
    said = "tokens" if found is None else f"tokens, τ {found:+.2f}"
    panel = Panel(f"Length of the {part}", said, x_name="difficulty percentile", y_name="tokens", x_range=(0.0, 100.0))
    return scatter(panel, {part: ("s0", points)}, [Curve("median of a tenth", [medians], "s2", "line")])


def by_category(ranking: Ranking) -> Html | None:
    """Mean difficulty of each category, as bars."""
    found = categories(ranking.records)
    if not found:
        return None
    largest = sorted(found.items(), key=lambda row: -row[1]["examples"])[:MOST_CATEGORIES]
    rows = sorted(largest, key=lambda row: row[1]["mean_percentile"])
    body = [
        (name, count(row["examples"]), bar(row["mean_percentile"], f"{100 * row['mean_percentile']:.0f}"))
        for name, row in rows
    ]
    left_out = note(f"The {MOST_CATEGORIES} largest of {len(found)}.") if len(found) > len(rows) else None
    meaning = note("Mean difficulty percentile: 0 is the easiest example, 100 the hardest.")
    columns = ["category", "examples", "mean percentile"]
    return join(tag("h4", "By category"), meaning, left_out, _bars(columns, body, "difficulty by category"))


def bar(share: float, words: Node, look: str = "s1") -> Html:
    """A bar of a share of its cell, with its value."""
    inner = tag("span", class_=f"bar {look}", style=f"width:{100 * max(0.0, min(1.0, share)):.1f}%")
    return tag("span", tag("span", inner, class_="track"), tag("span", words, class_="value"), class_="barred")


def _bars(columns: Sequence[Node], rows: Sequence[Sequence[Node]], caption: str) -> Html:
    return table(columns, rows, caption=caption, class_="bars")


def quarters(entry: Entry) -> Html:
    """ROUGE-L and loss of each quarter of the first ranking over stage ends, and what was forgotten."""
    found = buckets(entry.metrics)
    if not found and not entry.rankings:
        return note("This run ranked nothing, so there are no quarters to follow.")
    if not found:
        return note(
            "No quarter was asked at a stage’s end: ",
            tag("code", "--bucket-examples"),
            " was 0, or the first stage is not over.",
        )
    charts = [
        line_chart(
            Panel(title, unit, bands=entry.bands),
            [
                Curve(QUARTERS[b["bucket"]], [list(zip(b["steps"], b[key], strict=True))], f"q{b['bucket']}", "dots")
                for b in found
            ],
        )
        for key, title, unit in (
            ("rouge_l", "ROUGE-L by quarter", "at stage ends"),
            ("cross_entropy", "Cross-entropy by quarter", "nats a token"),
        )
    ]
    most = max([1.0, *(b["rouge_l_forgotten"] for b in found)])
    body = [
        (
            QUARTERS[b["bucket"]],
            f"{b['rouge_l'][-1]:.1f}",
            f"{b['cross_entropy'][-1]:.2f}",
            f"{b['cross_entropy_risen']:+.2f}",
            bar(b["rouge_l_forgotten"] / most, f"{b['rouge_l_forgotten']:.1f}", f"q{b['bucket']}"),
        )
        for b in found
    ]
    columns = ["quarter", "ROUGE-L at the end", "cross-entropy at the end", "above its lowest"]
    columns.append("forgotten")
    meaning = note("Forgotten: how far ROUGE-L at the end is below its best stage end.")
    drawn = tag("div", *charts, class_="charts", data_linked=True)
    return join(drawn, meaning, _bars(columns, body, "what was forgotten"))


def rerankings(entry: Entry) -> Html | None:
    """What changed each time the student of that moment ranked again."""
    if len(entry.rankings) < 2:
        return None
    first, rows = entry.rankings[0], []
    for ranking in entry.rankings:
        shared = [i for i in first.places if i in ranking.places]
        found = tau([first.places[i] for i in shared], [ranking.places[i] for i in shared])
        means = []
        for column in COLUMNS:
            values = [r[column] for r in ranking.records if r.get(column) is not None]
            if column in first.columns:
                means.append(f"{_axis(column)[1] * statistics.fmean(values):.2f}" if values else "–")
        rows.append([ranking.place, "–" if found is None else f"{found:+.2f}", *means])
    columns = [
        "ranking",
        "Kendall’s τ with the first",
        *(f"mean {COLUMNS[c].label}" for c in COLUMNS if c in first.columns),
    ]
    return join(tag("h4", "Ranked again"), table(columns, rows, caption="rankings"))


def distinct(entries: Sequence[Entry]) -> list[tuple[list[Entry], Ranking]]:
    """The different first rankings, and whose they are: runs of one student often rank alike."""
    found: dict[tuple[Any, ...], tuple[list[Entry], Ranking]] = {}
    for entry in entries:
        if entry.rankings:
            ranking = entry.rankings[0]
            key = tuple((r["id"], r.get("answer")) for r in ranking.records)
            found.setdefault(key, ([], ranking))[0].append(entry)
    return list(found.values())


def whose(entries: Sequence[Entry]) -> str:
    """The names of the rows, in words."""
    names = [entry.name for entry in entries]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
