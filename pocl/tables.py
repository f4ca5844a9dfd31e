"""Tables from what runs left behind: evaluation summaries by row and set."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocl.errors import UserError
from pocl.files import read_json

METRICS = {"rouge_l": "ROUGE-L", "exact_match": "exact match"}


def read_summary(path: Path) -> dict[str, Any]:
    """The summary.json of an eval folder, or of a run folder's eval/.  Raises UserError where there is none."""
    for candidate in (path / "summary.json", path / "eval" / "summary.json"):
        if candidate.is_file():
            return read_json(candidate)
    raise UserError(f"{path} holds no evaluation (summary.json); run evaluate.py first")


def results_table(rows: Mapping[str, Path], metric: str = "rouge_l") -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of mean ± spread over seeds, one column a set and the average of the sets behind them.

    A set that a row was not evaluated on is a dash, and such a row has no average.
    """
    summaries = {name: read_summary(path) for name, path in rows.items()}
    sets = list(dict.fromkeys(name for summary in summaries.values() for name in summary))
    body = []
    for row, summary in summaries.items():
        cells = [_cell(summary[name][metric]) if name in summary else "–" for name in sets]
        if len(sets) > 1:
            complete = all(name in summary for name in sets)
            means = [summary[name][metric]["mean"] for name in sets if name in summary]
            cells.append(f"{sum(means) / len(means):.2f}" if complete else "–")
        body.append([row, *cells])
    return [METRICS[metric], *sets, *(["average"] if len(sets) > 1 else [])], body


def _cell(scores: Mapping[str, Any]) -> str:
    if len(scores["seeds"]) == 1:
        return f"{scores['mean']:.2f}"
    return f"{scores['mean']:.2f} ± {scores['std']:.2f}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
