"""How tools/benchmark.py tells what it has measured: two tables, benchmark.json and benchmark.png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen
import matplotlib.pyplot as plt

from pocl.common.console import say, show_table
from pocl.common.files import write_json

BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's palette, which colour-blind readers can tell apart


def report(result: Mapping[str, Any]) -> None:
    """Print the tables, write them as JSON and as a picture.

    ``result`` is what benchmark.json holds:

    - ``settings``: the options, with what the device decided where nothing was given.
    - ``machine``: ``device``, ``torch``, the measured ``flops_per_second`` and ``bytes_per_second``, and
      ``floor_seconds``, the least time for each round at these rates.
    - ``steps``, one record a variant: ``name``; by round ``seconds`` and ``losses`` (per response token); the largest
      ``loss_error`` and ``gradient_error`` of any round, as shares of the reference's; ``processed_ratio``, processed
      tokens to real ones; ``samples_per_second`` of the median round; ``speedup``, that to the reference's;
      ``floor_share``, the median of floor to seconds; ``peak_gb`` where memory was measured.
    - ``losses``, one record an implementation of the divergence: ``name``, ``loss`` (per token), ``gradient_error``
      against float64, ``seconds`` by round, ``peak_gb``.
    """
    settings, machine, steps, losses = (result[key] for key in ("settings", "machine", "steps", "losses"))
    where = f"{settings['pair']}, {settings['dtype']}, {machine['device']}"
    title = f"{where}, {settings['batch']} examples a step, lengths of {Path(settings['data_dir'] or 'sample').name}"
    show_table(title, *step_table(steps))
    if losses:
        show_table(f"{where}, JSD of {settings['loss_tokens']} response tokens", *loss_table(losses))
    rates = f"{machine['flops_per_second'] / 1e9:.0f} GFLOP/s and {machine['bytes_per_second'] / 1e9:.1f} GB/s"
    say(
        "speed: the median round's, against the reference; GB: peak; padded: processed tokens to real ones; floor: "
        f"share of the time that the least work would take at {rates}, which a large product and a large copy reached "
        "here"
    )
    output = Path(settings["output_dir"])
    write_json(output / "benchmark.json", result)
    draw(steps, title=title, output=output / "benchmark.png")
    say(f"written to {output}/benchmark.json and benchmark.png")


def step_table(steps: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the variants of the step."""
    columns = ["a step, idea by idea", "samples/s", "speed", "GB", "padded", "floor"]
    rows = [
        [record["name"], f"{record['samples_per_second']:.2f}", f"{record['speedup']:.1f}x", gigabytes(record)]
        + [f"{record['processed_ratio']:.2f}", f"{record['floor_share']:.0%}"]
        for record in steps
    ]
    return columns, rows


def loss_table(losses: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of the implementations of the divergence."""
    rows = [
        [record["name"], f"{1e3 * min(record['seconds']):.0f}", gigabytes(record), f"{record['gradient_error']:.1e}"]
        for record in losses
    ]
    return ["divergence", "ms", "GB", "gradient error"], rows


def gigabytes(record: Mapping[str, Any]) -> str:
    """Peak memory as a cell of a table."""
    return f"{record['peak_gb']:.2f}" if "peak_gb" in record else "–"


def draw(steps: Sequence[dict[str, Any]], *, title: str, output: Path) -> None:
    """Speed, and memory where it was measured, as bars from the reference down."""
    panels = [("samples_per_second", "samples/s", BLUE)]
    if "peak_gb" in steps[0]:
        panels.append(("peak_gb", "peak memory [GB]", ORANGE))
    size = (6 + 3.5 * len(panels), 0.8 + 0.5 * len(steps))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained", squeeze=False)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    for panel, (key, label, color) in zip(axes[0], panels, strict=True):
        values = [record[key] for record in steps]
        bars = panel.barh([record["name"] for record in steps], values, color=color)
        panel.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        panel.set_xlabel(label)
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.savefig(output, dpi=130)
    plt.close(figure)
