"""Draw one run as a picture: pool, temperature and KD ratio, losses and dev ROUGE-L over optimiser steps.

python tools/plot_run.py --run results/gpt2/pocl/tfkl/seed10      # writes curves.png into the run folder
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pocl.cli.flags import flag, parse
from pocl.cli.process import quiet_libraries, run_main
from pocl.common.console import say
from pocl.common.errors import UserError
from pocl.training.run_folder import RunFolder
from tools.reporting.curves import PICTURES, picture_path, run_title, running_mean, stage_slices

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


@dataclass(frozen=True)
class PlotOptions:
    """Which run."""

    _argument_group_name: ClassVar[str] = "picture"
    run: str = flag("run folder")
    output: str | None = flag(f"picture to write, {' '.join(PICTURES)} [default: curves.png in the run folder]", None)


def main() -> None:
    """Read metrics.jsonl, draw, save."""
    quiet_libraries()
    (what,) = parse([PlotOptions], "Draw one run as a picture.")
    run = RunFolder(Path(what.run))
    output = picture_path(what.output, run.path / "curves.png")
    records = run.read_metrics()
    steps = [record for record in records if "loss" in record]
    if not steps:
        raise UserError(f"{run.path} holds no metrics (metrics.jsonl); is it a run folder?")
    dev = [record for record in records if "dev_rouge_l" in record]
    draw(steps, dev, title=run_title(run.path), output=output)
    say(f"picture written to {output}")


def draw(steps: Sequence[dict[str, Any]], dev: Sequence[dict[str, Any]], *, title: str, output: Path) -> None:
    """Four panels over one axis of optimiser steps, with the stages as bands behind them."""
    figure, (pool, ramps, losses, scores) = plt.subplots(
        4, 1, figsize=(9, 9.5), sharex=True, layout="constrained", height_ratios=(1, 1, 1.6, 1.3)
    )
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    x = [record["step"] for record in steps]
    pool.step(x, [record["pool"] for record in steps], where="post", color=BLUE)
    pool.set(ylabel="pool\n[examples]", ylim=(0, None))
    ramps.step(x, [record["temperature"] for record in steps], where="post", color=BLUE, label="temperature T")
    ramps.step(x, [record["kd_ratio"] for record in steps], where="post", color=ORANGE, label="KD ratio r")
    ramps.set(ylabel="T and r", ylim=(0, None))
    draw_losses(losses, x, steps)
    scores.plot([r["step"] for r in dev], [r["dev_rouge_l"] for r in dev], "o-", color=GREEN, ms=4)
    scores.set(ylabel="dev ROUGE-L", xlabel="optimiser step")
    scores.set_ylim(0, 1.2 * max([1.0, *(record["dev_rouge_l"] for record in dev)]))
    if dev:
        best = max(dev, key=lambda record: record["dev_rouge_l"])
        scores.annotate(
            f"best {best['dev_rouge_l']:.1f}",
            (best["step"], best["dev_rouge_l"]),
            textcoords="offset points",
            xytext=(4, 7),
            ha="right",
            color=GREEN,
        )
    for axes in (pool, ramps, losses, scores):
        shade_stages(axes, steps, named=axes is pool)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
    for axes in (ramps, losses):
        axes.legend(loc="best", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def draw_losses(axes: Axes, x: Sequence[int], steps: Sequence[dict[str, Any]]) -> None:
    """The objective's parts: every step faintly, their running mean in each stage clearly."""
    curves = {"cross-entropy": ("cross_entropy", GREY), "divergence, before T^k": ("divergence", BLUE)}
    for label, (key, color) in curves.items():
        values = [record[key] for record in steps]
        if not any(values):
            continue  # no teacher
        axes.plot(x, values, color=color, alpha=0.3, lw=0.8)
        for stage, (start, stop) in stage_slices(steps).items():  # a new pool and T: a mean must not run across
            means = running_mean(values[start:stop])
            axes.plot(x[start:stop], means, color=color, label=None if stage else label)
    axes.set(ylabel="loss [nats/token]", ylim=(0, None))


def shade_stages(axes: Axes, steps: Sequence[dict[str, Any]], *, named: bool) -> None:
    """A band behind every second stage; the top panel says their numbers."""
    for stage, (first, last) in stage_slices(steps).items():
        start, stop = steps[first]["step"] - 0.5, steps[last - 1]["step"] + 0.5
        if stage % 2:
            axes.axvspan(start, stop, color=GREY, alpha=0.08, lw=0)
        if named:
            axes.text(
                (start + stop) / 2, 1.02, f"stage {stage + 1}", transform=axes.get_xaxis_transform(), ha="center"
            )


if __name__ == "__main__":
    run_main(main)
