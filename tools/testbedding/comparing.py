"""Results of arms as rows: means over seeds, and paired differences to the baseline with interval and Holm's p."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.reporting.intervals import holm, paired_t
from tools.testbedding.arms import BASELINE, Arm

Result = Mapping[str, Any]
MEANS = ("rouge_l", "exact_match", "cross_entropy", "agreement", "tokens", "teacher_forward_passes", "seconds")
COLUMNS = ("arm", "seeds", "ROUGE-L", f"to {BASELINE}, 95 %", "p", "exact match", "cross-entropy")
COLUMNS += ("ranking and grade", "tokens", "teacher passes")


@dataclass(frozen=True)
class Difference:
    """To the baseline, in ROUGE-L, over the seeds that both have."""

    mean: float
    half: float  # of the 95 % t-interval
    p: float  # of the paired t-test, by Holm's correction over the regime's arms


@dataclass(frozen=True)
class Row:
    """An arm of one regime."""

    name: str
    seeds: int
    means: Mapping[str, float]
    difference: Difference | None  # None: the baseline, or fewer than two seeds
    updates: int


def compare(arms: Sequence[Arm], results: Mapping[str, Mapping[int, Result]]) -> list[Row]:
    """Rows of one regime, of the arms that have a result; ``results`` by arm and seed."""
    there = [arm.name for arm in arms if results.get(arm.name)]
    base = results.get(BASELINE, {})
    found = {}
    for name in there:
        shared = sorted(base.keys() & results[name].keys())
        if name != BASELINE and len(shared) > 1:
            found[name] = paired_t([results[name][seed]["rouge_l"] - base[seed]["rouge_l"] for seed in shared])
    corrected = dict(zip(found, holm([p for _, _, p in found.values()]), strict=True))
    rows = []
    for name in there:
        seeds = list(results[name].values())
        means = {key: statistics.fmean(result[key] for result in seeds) for key in MEANS}
        difference = Difference(*found[name][:2], corrected[name]) if name in found else None
        rows.append(Row(name, len(seeds), means, difference, seeds[0]["optimizer_steps"]))
    return rows


def text_rows(rows: Sequence[Row]) -> list[list[str]]:
    """The cells under ``COLUMNS``; † where an arm made other updates than the baseline."""
    updates = next((row.updates for row in rows if row.name == BASELINE), rows[0].updates if rows else 0)
    cells = []
    for row in rows:
        means, difference = row.means, row.difference
        cells.append(
            [
                row.name + ("" if row.updates == updates else f" † {row.updates}"),
                str(row.seeds),
                f"{means['rouge_l']:.1f}",
                f"{difference.mean:+.1f} ± {difference.half:.1f}" if difference else "–",
                ("< 0.001" if difference.p < 0.001 else f"{difference.p:.3f}") if difference else "–",
                f"{means['exact_match']:.1f}",
                f"{means['cross_entropy']:.3f}",
                f"{means['agreement']:.2f}",
                f"{means['tokens'] / 1e3:,.0f}k",
                f"{means['teacher_forward_passes']:,.0f}",
            ]
        )
    return cells


def notes(rows: Sequence[Row]) -> list[str]:
    """What is said below the tables."""
    lines = [
        "Means over seeds; a seed is another draw of all data, another student and another shuffling, under one "
        "teacher. All arms of a seed start alike, and all make as many updates; † says how many one made instead.",
        f"to {BASELINE}: difference in ROUGE-L, paired by seed, with its 95 % t-interval; p of the paired t-test, "
        "by Holm's correction over the arms of the regime; the interval is not corrected.",
        "ranking and grade: Spearman's correlation of the ranking that an arm could use with the length of the list.",
        "teacher passes: examples that the teacher's trunk read; its states of them are kept.",
    ]
    if rows and max(row.seeds for row in rows) == 1:
        lines.append("One training seed: nothing here says how much of a difference is chance.")
    return lines
