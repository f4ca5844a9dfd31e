"""What is drawn of runs, rankings and tables, one panel a question."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pocl.difficulty.diagnostics import buckets, categories, tau
from pocl.difficulty.ranking import column_named
from tools.reporting.data import Entry, Ranking, Record
from tools.reporting.drawings import COLORS, Panel, curve, finish, say_nothing
from tools.reporting.tables import POCL, Table

MOST_DOTS = 600  # of one ranking
MOST_CATEGORIES = 16
QUARTERS = {1: "easiest quarter", 2: "second", 3: "third", 4: "hardest quarter"}
STEP = "optimiser step"


@dataclass(frozen=True)
class OverSteps:
    """A panel over optimiser steps. ``columns`` of metrics.jsonl -> what each is called.

    A run has it where the first of the columns, or one of ``dev``, has values that are not all 0.
    """

    title: str
    unit: str
    columns: Mapping[str, str]
    shape: str  # mean: every step faintly and the running mean of a stage; steps and line: as they are
    dev: Mapping[str, str] = field(default_factory=dict)  # columns of the dev evaluations that belong in it

    def known(self, entry: Entry) -> tuple[Mapping[str, str], dict[str, str]]:
        """The columns of steps and of dev evaluations that a run has values of."""
        has = any(any(record.get(column) for record in entry.steps) for column in [*self.columns][:1])
        dev = {c: name for c, name in self.dev.items() if any(r.get(c) is not None for r in entry.dev)}
        return self.columns if has else {}, dev


TRAINING = (
    OverSteps("ROUGE-L on dev", "0 to 100", {}, "line", {"dev_rouge_l": "dev"}),
    OverSteps("Cross-entropy", "nats a token", {"cross_entropy": "training"}, "mean", {"dev_cross_entropy": "dev"}),
    OverSteps("Divergence", "nats a token, before T^k", {"divergence": "divergence"}, "mean"),
    OverSteps("Loss", "the objective, nats a token", {"loss": "loss"}, "mean"),
    OverSteps("Pool", "examples", {"pool": "pool"}, "steps"),
    OverSteps("KD ratio and temperature", "", {"kd_ratio": "KD ratio r", "temperature": "temperature T"}, "steps"),
    OverSteps("Learning rate", "", {"lr": "learning rate"}, "line"),
    OverSteps("Gradient norm", "before clipping", {"gradient_norm": "gradient norm"}, "mean"),
    OverSteps("Speed", "training tokens a second", {"tokens_per_second": "speed"}, "mean"),
    OverSteps("Student's own text", "share of the examples", {"student_text": "share"}, "mean"),
)


def training(entry: Entry) -> list[Panel]:
    """The panels of a run over optimiser steps."""
    shown = [kind for kind in TRAINING if any(kind.known(entry))]
    return [Panel(kind.title, kind.unit, partial(_over_steps, kind, entry)) for kind in shown]


def _over_steps(kind: OverSteps, entry: Entry, axes: Axes) -> None:
    columns, dev = kind.known(entry)
    for color, (column, name) in zip(("s1", "s2"), columns.items(), strict=False):
        pieces = _by_stage(entry.steps, column)
        look = {"linestyle": "--" if color == "s2" else "-"}
        if kind.shape == "mean":
            curve(axes, [np.vstack(pieces)], color, linewidth=0.8, alpha=0.4)
            pieces = [_running_means(piece) for piece in pieces]  # a new pool and T: a mean must not run across
        if kind.shape == "steps":
            pieces, look["drawstyle"] = [np.vstack(pieces)], "steps-post"
        curve(axes, pieces, color, name=name, **look)
    for column, name in dev.items():
        points = np.array([(r["step"], r[column]) for r in entry.dev if r.get(column) is not None], dtype=float)
        curve(axes, [points], "s2" if columns else "s3", name=name, marker="o", linestyle="--" if columns else "-")
    if "dev_rouge_l" in dev and entry.best:
        _mark_best(axes, entry.best)
    _shade(axes, entry)
    finish(axes, STEP)


def _by_stage(steps: Sequence[Record], column: str) -> list[np.ndarray]:
    """(step, value) of the steps that have one, [N, 2] a stage."""
    known = [record for record in steps if record.get(column) is not None]
    groups = itertools.groupby(known, key=lambda record: record["stage"])
    return [np.array([(r["step"], r[column]) for r in group], dtype=float) for _, group in groups]


def _running_means(points: np.ndarray) -> np.ndarray:
    known = points[np.isfinite(points).all(axis=1)]
    return np.column_stack([known[:, 0], running_mean(known[:, 1].tolist())])


def running_mean(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """The exponentially weighted mean up to each value, without the bias of its start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def _mark_best(axes: Axes, best: Record) -> None:
    step, value = best["step"], best["dev_rouge_l"]
    axes.plot([step], [value], "o", markersize=8, markerfacecolor="none", markeredgewidth=1.5, color=COLORS["ink"])
    side = "right" if step > np.mean(axes.dataLim.intervalx) else "left"
    axes.annotate(f"best {value:.1f}", (step, value), (0, 8), textcoords="offset points", ha=side, color=COLORS["ink"])
    axes.dataLim.update_from_data_y([1.15 * value], ignore=False)  # room for the words


def _shade(axes: Axes, entry: Entry) -> None:
    """A band behind every second stage, and the numbers of the stages above."""
    if not entry.bands:
        return
    first, last = entry.bands[0][1], entry.bands[-1][2]
    for stage, start, stop in entry.bands:
        if stage % 2 == 0:
            axes.axvspan(start, stop, color=COLORS["band"], linewidth=0)
        share = (stop - start) / (last - first)
        words = f"stage {stage}" if share > 0.15 else str(stage) if share > 0.04 else ""
        if len(entry.bands) > 1:
            axes.text((start + stop) / 2, 1.04, words, transform=axes.get_xaxis_transform(), ha="center", fontsize=9.5)
    axes.set_xlim(first, last)


def quarters(entry: Entry) -> list[Panel]:
    """How each quarter of the first ranking fared over the ends of stages, and what was forgotten."""
    found = buckets(entry.metrics)
    panels = [
        Panel("ROUGE-L by quarter", "at stage ends", partial(_by_quarter, entry, found, "rouge_l")),
        Panel("Cross-entropy by quarter", "nats a token", partial(_by_quarter, entry, found, "cross_entropy")),
        Panel("Forgotten", "ROUGE-L below its best stage end", partial(_forgotten, found)),
    ]
    nothing = partial(say_nothing, reason="--bucket-examples was 0")
    return panels if found else [replace(panel, draw=nothing) for panel in panels]


def _by_quarter(entry: Entry, found: Sequence[Record], column: str, axes: Axes) -> None:
    for bucket in found:
        points = np.column_stack([bucket["steps"], bucket[column]])
        quarter = bucket["bucket"]
        curve(axes, [points], f"q{quarter}", name=QUARTERS[quarter], marker="o")
    _shade(axes, entry)
    finish(axes, STEP)


def _forgotten(found: Sequence[Record], axes: Axes) -> None:
    bars = [(QUARTERS[b["bucket"]], b["rouge_l_forgotten"], f"q{b['bucket']}") for b in found]
    names, values, colors = zip(*bars, strict=True)
    axes.bar_label(axes.bar(names, values, width=0.6, color=[COLORS[color] for color in colors]), fmt="%.1f")
    axes.set(xlim=(-0.6, len(found) - 0.4), ylim=(0, max(1.0, 1.2 * max(values))))
    axes.tick_params(axis="x", length=0)


def ranking(found: Ranking) -> list[Panel]:
    """What one ranking is made of: its values, how its columns agree, lengths, categories."""
    panels = [_spread(found, column) for column in found.columns]
    for pair in itertools.islice(itertools.combinations(found.columns, 2), 3):
        agreement = tau(*([record[f"{column}_rank"] for record in found.records] for column in pair))
        said = "" if agreement is None else f"Kendall’s τ {agreement:+.2f}"
        panels.append(Panel("Agreement", said, partial(_agreement, found, *pair)))
    for part in ("response", "prompt") if found.has_lengths else ():
        values = [record[f"{part}_tokens"] for record in found.records]
        along = tau(range(len(values)), values)
        said = "tokens" if along is None else f"tokens, τ {along:+.2f}"
        panels.append(Panel(f"Length of the {part}", said, partial(_lengths, np.array(values), part)))
    named = categories(found.records)
    if named:
        panels.append(Panel("By category", "mean difficulty percentile", partial(_categories, named)))
    return panels


def _spread(found: Ranking, column: str) -> Panel:
    """How the values of a column are spread, by quarter of the ranking."""
    is_rouge = column == "rouge_l"  # it stands from 0 to 100 all over the page
    label, unit = column_named(column).label, "0 to 100" if is_rouge else column_named(column).unit
    values = np.array([math.nan if r[column] is None else r[column] for r in found.records], dtype=float)
    return Panel(
        label[0].upper() + label[1:], unit, partial(_histogram, found, values * (100 if is_rouge else 1), is_rouge)
    )


def _histogram(found: Ranking, values: np.ndarray, is_rouge: bool, axes: Axes) -> None:
    known, places = np.isfinite(values), np.array(found.quarters)
    if not known.any():
        say_nothing(axes, "no example has a value")
        return
    groups = {quarter: values[known & (places == quarter)] for quarter in sorted(set(found.quarters))}
    axes.hist(
        list(groups.values()), bins=20, range=(0, 100) if is_rouge else None, stacked=True, rwidth=0.92,
        color=[COLORS[f"q{quarter}"] for quarter in groups], label=[QUARTERS[quarter] for quarter in groups],
    )  # fmt: skip
    finish(axes, "", "examples")


def _some(size: int) -> slice:
    """Evenly spaced examples, no more than can be told apart."""
    return slice(None, None, math.ceil(size / MOST_DOTS))


def _agreement(found: Ranking, one: str, other: str, axes: Axes) -> None:
    some, places = _some(len(found.records)), np.array(found.quarters)
    ranks = np.array([(r[f"{one}_rank"], r[f"{other}_rank"]) for r in found.records])
    for quarter in sorted(set(found.quarters)):
        points = ranks[some][places[some] == quarter]
        axes.plot(*points.T, ".", color=COLORS[f"q{quarter}"], alpha=0.65, label=QUARTERS[quarter])
    finish(axes, f"rank by {column_named(one).label}", f"rank by {column_named(other).label}")


def _lengths(values: np.ndarray, part: str, axes: Axes) -> None:
    """Dots, and the median of each tenth."""
    percent, some = np.linspace(0, 100, len(values)), _some(len(values))
    axes.plot(percent[some], values[some], ".", color=COLORS["s0"], alpha=0.65, label=f"tokens of a {part}")
    tenths = np.array_split(np.arange(len(values)), min(10, len(values)))
    medians = [(percent[tenth].mean(), np.median(values[tenth])) for tenth in tenths]
    curve(axes, [np.array(medians)], "s2", name="median of a tenth")
    finish(axes, "difficulty percentile")


def _categories(named: Mapping[str, Mapping[str, Any]], axes: Axes) -> None:
    """The largest categories as bars, the easiest at the top."""
    largest = sorted(named.items(), key=lambda row: -row[1]["examples"])[:MOST_CATEGORIES]
    rows = sorted(largest, key=lambda row: -row[1]["mean_percentile"])
    left_out = f", the {len(rows)} largest of {len(named)}" if len(rows) < len(named) else ""
    look = {"va": "center", "fontsize": min(10.5, 110 / len(rows)), "color": COLORS["ink"]}
    for i, (name, row) in enumerate(rows):
        percent = 100 * row["mean_percentile"]
        axes.barh(i, percent, color=COLORS["s1"], alpha=0.3)
        axes.text(1, i, f"{name} ({row['examples']})", **look)
        axes.text(100, i, f"{percent:.0f}", ha="right", **look)
    axes.set(xlim=(0, 100), ylim=(-0.6, len(rows) - 0.4), yticks=[], xticks=[0, 25, 50, 75, 100])
    axes.grid(visible=False)
    axes.set_xlabel(f"0: the easiest example{left_out}", loc="right", style="italic")


def learning(runs: Sequence[Entry]) -> list[Panel]:
    """Dev ROUGE-L of every run, a baseline and its POCL row in one panel, all panels to one scale."""
    groups: dict[str, list[Entry]] = {}
    for entry in runs:
        if entry.dev:
            groups.setdefault(entry.name.removesuffix(POCL), []).append(entry)
    top = max((r["dev_rouge_l"] for entry in runs for r in entry.dev), default=1.0)
    return [Panel(name, "", partial(_learning, group, top)) for name, group in groups.items()]


def _learning(group: Sequence[Entry], top: float, axes: Axes) -> None:
    for entry in group:
        behind = len(group) > 1 and not entry.name.endswith(POCL)
        points = np.array([(record["step"], record["dev_rouge_l"]) for record in entry.dev], dtype=float)
        look = {"color": "s0", "linestyle": ":"} if behind else {"color": "s1"}
        curve(axes, [points], name=entry.name, marker="o", **look)
    axes.dataLim.update_from_data_y([0, top], ignore=False)
    axes.dataLim.update_from_data_x([0], ignore=False)
    finish(axes, STEP)


def intervals(made: Table) -> Panel:
    """The last column of a table: each mean on the line of its 95 % interval, and the paper's figure as a ring."""
    column = made.columns[-1]
    rows = [(row.name, row.cells[column]) for row in made.rows if column in row.cells]
    ring = "; ring: the paper’s figure" if any(cell.published is not None for _, cell in rows) else ""
    return Panel(f"ROUGE-L, {column}", f"mean and 95 % interval{ring}", partial(_intervals, rows[::-1]))


def _intervals(rows: Sequence[tuple[str, Any]], axes: Axes) -> None:
    for i, (name, cell) in enumerate(rows):
        color = COLORS["s1" if name.endswith(POCL) else "s0"]
        axes.plot([cell.low, cell.high], [i, i], color=color, alpha=0.6)
        axes.plot([cell.mean], [i], "o", color=color)
        if cell.published is not None:
            axes.plot([cell.published], [i], "o", color=COLORS["s2"], markerfacecolor="none", markeredgewidth=1.5)
    finish(axes, "", "")
    size = min(10.5, 120 / len(rows))
    names = [name if len(name) <= 26 else f"{name[:25]}…" for name, _ in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=size)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    left, bottom, width, height = axes.get_position().bounds
    axes.set_position((0.36, bottom, width + left - 0.36, height))
