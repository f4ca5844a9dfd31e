"""What a curriculum was made of and what it did: agreement of the rankings, lengths, categories, forgetting."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocl.common.files import write_json
from pocl.difficulty.ranking import COLUMNS, ranked_columns

Record = Mapping[str, Any]


def write_diagnostics(path: Path, ranking: Sequence[Record], metrics: Sequence[Record]) -> list[str]:
    """Write what ``diagnose`` finds to diagnostics.json -> its summary, line by line."""
    found = diagnose(ranking, metrics)
    write_json(path, found)
    return summary(found)


def diagnose(ranking: Sequence[Record], metrics: Sequence[Record]) -> dict[str, Any]:
    """The numbers of diagnostics.json, from the records of difficulty.jsonl (easiest first) and of metrics.jsonl."""
    columns = ranked_columns(ranking)
    return {
        "examples": len(ranking),
        "agreement": {
            f"{COLUMNS[one].label} and {COLUMNS[other].label}": tau(
                [record[f"{one}_rank"] for record in ranking], [record[f"{other}_rank"] for record in ranking]
            )
            for one, other in itertools.combinations(columns, 2)
        },
        "ties": {column: ties([record[column] for record in ranking]) for column in columns},
        "rouge_l_is_0": sum(record["rouge_l"] == 0.0 for record in ranking) if "rouge_l" in columns else None,
        "difficulty_and_length": {
            name: tau(range(len(ranking)), [record[f"{name}_tokens"] for record in ranking])
            for name in ("prompt", "response")
        }
        if "prompt_tokens" in ranking[0]  # a file from elsewhere may hold nothing but the order
        else None,
        "categories": categories(ranking),
        "buckets": buckets(metrics),
    }


def tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b of two rankings: 1 for the same order, -1 for the opposite; None if one of them is constant."""
    from scipy.stats import kendalltau  # here: the import takes a second, and most starts never need it

    value = float(kendalltau(one, other).statistic)
    return None if np.isnan(value) else value


def ties(values: Sequence[float]) -> int:
    """How many examples share their value with another: the example id decides between them."""
    _, counts = np.unique(np.array(values, dtype=np.float64), return_counts=True)
    return int(counts[counts > 1].sum())


def categories(ranking: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By category, from the easiest: how many examples, and their mean difficulty percentile (0 to 1, the hardest)."""
    places: dict[str, list[float]] = {}
    for place, record in enumerate(ranking):
        if record.get("category"):
            places.setdefault(record["category"], []).append(place / max(1, len(ranking) - 1))
    rows = {name: {"examples": len(p), "mean_percentile": float(np.mean(p))} for name, p in places.items()}
    return dict(sorted(rows.items(), key=lambda row: (row[1]["mean_percentile"], row[0])))


def buckets(metrics: Sequence[Record]) -> list[dict[str, Any]]:
    """One record per bucket, the easiest first: the curves over stage ends, and what was forgotten.

    Forgetting is how much worse the last value is than the best one at an earlier stage's end; 0 if it is the best.
    """
    ends = [record for record in metrics if "bucket1_rouge_l" in record]
    numbers = itertools.takewhile(lambda n: ends and f"bucket{n}_rouge_l" in ends[0], itertools.count(1))
    rows = []
    for number in numbers:
        rouge_l = [record[f"bucket{number}_rouge_l"] for record in ends]
        cross_entropy = [record[f"bucket{number}_cross_entropy"] for record in ends]
        rows.append(
            {
                "bucket": number,
                "steps": [record["step"] for record in ends],
                "rouge_l": rouge_l,
                "cross_entropy": cross_entropy,
                "rouge_l_forgotten": max(rouge_l) - rouge_l[-1],
                "cross_entropy_risen": cross_entropy[-1] - min(cross_entropy),
            }
        )
    return rows


def summary(found: Mapping[str, Any]) -> list[str]:
    """A readable summary, line by line."""
    lines = []
    for pair, value in found["agreement"].items():
        lines.append(f"rankings by {pair}: Kendall's tau {_signed(value)}")
    if found["rouge_l_is_0"] is not None:
        share = found["rouge_l_is_0"] / found["examples"]
        lines.append(f"{found['rouge_l_is_0']} of {found['examples']} answers ({share:.0%}) have ROUGE-L 0")
    lengths = found["difficulty_and_length"]
    if lengths:
        lines.append(
            f"difficulty and length: tau {_signed(lengths['prompt'])} with the prompt length, "
            f"{_signed(lengths['response'])} with the response length"
        )
    if found["buckets"]:
        easiest = found["buckets"][0]
        lines.append(
            f"easiest quarter: ROUGE-L {easiest['rouge_l'][-1]:.1f} at the end, {easiest['rouge_l_forgotten']:.1f} "
            f"below its best stage end; cross-entropy {easiest['cross_entropy_risen']:.2f} above its lowest"
        )
    return lines


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"
