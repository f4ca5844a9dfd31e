"""Draw what a run's curriculum was made of and what it did, from difficulty.jsonl and metrics.jsonl.

python tools/plot_difficulty.py --run results/gpt2/pocl/tfkl/seed10    # writes difficulty.png into the run folder
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.common.files import read_jsonl
from pocl.difficulty.diagnostics import diagnose, summary
from pocl.difficulty.ranking import COLUMNS, ranked_columns
from pocl.training.run_folder import RunFolder
from tools.reporting.curves import PICTURES, picture_path, read_stages, run_title

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
# From the easiest to the hardest; dark on light, so that print and colour-blind readers see the order.
BUCKET_COLORS = ("#9ecae1", "#4292c6", "#08519c", "#031c3b")
MOST_CATEGORIES = 20
PALE_TO_DARK = LinearSegmentedColormap.from_list("difficulty", BUCKET_COLORS)


@dataclass(frozen=True)
class PlotOptions:
    """Which run."""

    _argument_group_name: ClassVar[str] = "picture"
    run: str = flag("run folder")
    output: str | None = flag(
        f"picture to write, {' '.join(PICTURES)} [default: difficulty.png in the run folder]", None
    )


def main() -> None:
    """Read, say the numbers, draw, save."""
    quiet_libraries()
    (what,) = parse([PlotOptions], "Draw what a run's curriculum was made of and what it did.")
    run = RunFolder(Path(what.run))
    output = picture_path(what.output, run.path / "difficulty.png")
    path = run.first_ranking()
    if path is None:
        raise UserError(f"{run.path} holds no ranking (difficulty.jsonl); is it the folder of a run that ranked?")
    ranking, metrics = read_jsonl(path), run.read_metrics()
    if not ranking or "response_tokens" not in ranking[0]:
        raise UserError(f"{path} does not say how long its examples are; rank again")
    found = diagnose(ranking, metrics)
    for line in summary(found):
        say(line)
    draw(ranking, found, stage_starts(run), title=run_title(run.path), output=output)
    say(f"picture written to {output}")


def stage_starts(run: RunFolder) -> list[int]:
    """Where the pools of the stages end, as numbers of examples."""
    path = run.path / "stages.json"
    return sorted({stage.pool.stop for stage in read_stages(path)}) if path.is_file() else []


def draw(
    ranking: Sequence[Mapping[str, Any]],
    found: Mapping[str, Any],
    stages: Sequence[int],
    *,
    title: str,
    output: Path,
) -> None:
    """Six panels: what ranked, lengths, categories; ROUGE-L and loss by bucket, and what was forgotten."""
    figure, panels = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    draw_agreement(panels[0, 0], ranking, found)
    draw_lengths(panels[0, 1], ranking, stages)
    draw_categories(panels[0, 2], found["categories"])
    draw_buckets(panels[1, 0], found["buckets"], "rouge_l", "ROUGE-L at stage ends")
    draw_buckets(panels[1, 1], found["buckets"], "cross_entropy", "cross-entropy at stage ends [nats/token]")
    draw_forgetting(panels[1, 2], found["buckets"])
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def draw_agreement(axes: Axes, ranking: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    """The first two rankings against each other; with one ranking, its values from easy to hard."""
    columns = ranked_columns(ranking)
    percentile = np.linspace(0, 1, len(ranking))
    if not columns:
        say_nothing(axes, "the ranking was given without values")
        return
    if len(columns) < 2:
        values = [np.nan if record[columns[0]] is None else record[columns[0]] for record in ranking]
        axes.plot(percentile, values, ".", color=BLUE, ms=3)
        axes.set(xlabel="difficulty percentile", ylabel=COLUMNS[columns[0]].label, title="what ranked")
        return
    one, other = columns[:2]
    x, y = ([record[f"{column}_rank"] for record in ranking] for column in (one, other))
    points = axes.scatter(x, y, c=percentile, cmap=PALE_TO_DARK, s=9, linewidths=0)
    axes.figure.colorbar(points, ax=axes, label="difficulty percentile")
    agreement = found["agreement"][f"{COLUMNS[one].label} and {COLUMNS[other].label}"]
    said = "" if agreement is None else f", Kendall's τ {agreement:+.2f}"
    axes.set(xlabel=f"rank by {COLUMNS[one].label}", ylabel=f"rank by {COLUMNS[other].label}")
    axes.set_title(f"the two rankings{said}")


def draw_lengths(axes: Axes, ranking: Sequence[Mapping[str, Any]], stages: Sequence[int]) -> None:
    """Prompt and response length against difficulty: each example faintly, the median of each tenth clearly."""
    percentile = np.linspace(0, 1, len(ranking))
    for name, color in (("prompt", GREY), ("response", ORANGE)):
        values = np.array([record[f"{name}_tokens"] for record in ranking])
        axes.plot(percentile, values, ".", color=color, alpha=0.25, ms=3)
        tenths = np.array_split(np.arange(len(ranking)), min(10, len(ranking)))
        axes.plot(
            [percentile[tenth].mean() for tenth in tenths],
            [np.median(values[tenth]) for tenth in tenths],
            color=color,
            lw=2,
            label=f"{name}, median",
        )
    for end in stages[:-1]:
        axes.axvline(end / len(ranking), color=GREY, lw=0.6, ls=":")
    axes.set(xlabel="difficulty percentile (dotted: the stages' pools end)", ylabel="tokens")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # room for the legend
    axes.set_title("difficulty and length")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def draw_categories(axes: Axes, categories: Mapping[str, Mapping[str, float]]) -> None:
    """Mean difficulty percentile of each category, from the easiest."""
    axes.set_title("difficulty by category")
    if not categories:
        say_nothing(axes, "the data names no categories")
        return
    rows = sorted(categories.items(), key=lambda row: -row[1]["examples"])[:MOST_CATEGORIES]
    if len(rows) < len(categories):
        axes.set_title(f"difficulty by category, the {len(rows)} largest of {len(categories)}")
    rows.sort(key=lambda row: -row[1]["mean_percentile"])
    axes.barh([f"{name} ({row['examples']})" for name, row in rows], [row["mean_percentile"] for _, row in rows])
    for bar in axes.patches:
        bar.set_color(BLUE)
    axes.tick_params(axis="y", labelsize=10 if len(rows) <= 12 else 8)
    axes.axvline(0.5, color=GREY, lw=0.6, ls=":")
    axes.set(xlim=(0, 1), xlabel="mean difficulty percentile")


def draw_buckets(axes: Axes, buckets: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    """One curve for each quarter of the ranking."""
    axes.set_title(title)
    if not buckets:
        say_nothing(axes, "--bucket-examples was 0")
        return
    for bucket, color in zip(buckets, BUCKET_COLORS, strict=False):
        name = {1: " (easiest)", len(buckets): " (hardest)"}.get(bucket["bucket"], "")
        axes.plot(bucket["steps"], bucket[key], "o-", color=color, ms=4, label=f"quarter {bucket['bucket']}{name}")
    axes.set(xlabel="optimiser step")
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def draw_forgetting(axes: Axes, buckets: Sequence[Mapping[str, Any]]) -> None:
    """How far each bucket's ROUGE-L is behind its best stage end."""
    axes.set_title("ROUGE-L below the best stage end")
    if not buckets:
        say_nothing(axes, "--bucket-examples was 0")
        return
    names = [f"quarter {bucket['bucket']}" for bucket in buckets]
    bars = axes.bar(names, [bucket["rouge_l_forgotten"] for bucket in buckets], color=BUCKET_COLORS[: len(buckets)])
    axes.bar_label(bars, fmt="%.1f")
    axes.set_ylim(0, max(1.0, 1.2 * max(bucket["rouge_l_forgotten"] for bucket in buckets)))


def say_nothing(axes: Axes, reason: str) -> None:
    """An empty panel that says why it is empty."""
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    run_main(main)
