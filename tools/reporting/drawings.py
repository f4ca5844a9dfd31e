"""Drawings with matplotlib: as a picture, or as inline SVG in the colours of the page, which follow light and dark."""

import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pocl.common.errors import UserError

SHEET = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
COLORS = dict(re.findall(r"--(\w+): (#\w{6});", SHEET.partition("@media")[0]))  # name -> that of the light page
VARIABLES = {color: f"var(--{name})" for name, color in COLORS.items()}
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".webp", ".eps")  # endings that matplotlib writes without other programs
MOST_POINTS = 240  # of one line: more than a panel has places for
PLOT = (0.13, 0.255, 0.83, 0.655)  # left, bottom, width and height of the axes in a panel of the page
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": COLORS["quiet"],
    "axes.labelcolor": COLORS["quiet"],
    "axes.labelsize": 9.5,
    "axes.edgecolor": COLORS["quiet"],
    "axes.titlecolor": "black",
    "axes.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "axes.axisbelow": True,
    "grid.color": COLORS["grid"],
    "xtick.color": COLORS["quiet"],
    "ytick.color": COLORS["quiet"],
    "ytick.left": False,
    "lines.linewidth": 1.9,
    "lines.markersize": 6,
    "lines.markeredgewidth": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.0,
    "legend.handletextpad": 0.4,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollars
}


@dataclass(frozen=True)
class Panel:
    """One drawing: what stands above it, and the function that draws it into axes."""

    title: str
    unit: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Drawing:
    """A panel as the page holds it: markup, and what its script reads at the pointer, as JSON."""

    svg: str
    data: str


def drawing(panel: Panel, name: str) -> Drawing:
    """A panel as SVG; ``name`` is its own in the page, so that its ids are too."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(5, 3.08), facecolor="none")  # 360 points wide, as many as a phone has
        axes = figure.add_axes(PLOT)
        panel.draw(axes)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    data = readings(axes)
    said = html.escape(f"{panel.title}. {'; '.join(map(_said, data['lines']))}")
    superfluous = r"^.*?<svg|<style.*?</style>| id=\"[\w.]+_\d+\"| font-family:[^;]*;"
    svg = re.sub(superfluous, "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"(\.\d\d)\d+(?=[ \"\n)])", r"\1", svg)
    svg = re.sub("#[0-9a-f]{6}", lambda found: VARIABLES.get(found[0], found[0]), svg)
    svg = re.sub(r' width="\S+" height="\S+"', lambda _: f' role="img" aria-label="{said}"', svg, count=1)
    return Drawing("<svg" + svg, json.dumps(data))


def _said(line: dict[str, Any]) -> str:
    first, last = (number(points[1]) for points in (line["points"][0], line["points"][-1]))
    return f"{line['name']}: from {first} to {last}"


def readings(axes: Axes) -> dict[str, Any]:
    """The lines of a drawing that have a name, in their own numbers, and where the axes lie as shares of its width.

    ``steps`` says that a value stays until the next; what is not finite is left out.
    """
    lines = []
    for drawn in axes.get_lines():
        points = [
            [float(f"{v:.6g}") for v in point] for point in np.asarray(drawn.get_xydata()) if np.isfinite(point).all()
        ]
        name = str(drawn.get_label())
        if points and drawn.get_linestyle() != "None" and not name.startswith("_"):
            lines.append({"name": name, "steps": drawn.get_drawstyle() != "default", "points": points})
    return {"x": list(axes.get_xlim()), "plot": PLOT, "lines": lines}


def save_picture(panels: Sequence[Panel], path: Path, title: str, columns: int) -> None:
    """Write the panels side by side."""
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.4), facecolor="white", layout="constrained")
        figure.suptitle(title, fontsize=12, fontweight="bold", color="black", x=0.01, ha="left")
        for i, panel in enumerate(panels, start=1):
            axes = figure.add_subplot(rows, columns, i)
            panel.draw(axes)
            axes.set_title(", ".join(filter(None, (panel.title, panel.unit))), loc="left", pad=16, fontsize=10.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def picture_path(given: str | None, usual: Path) -> Path:
    """Where a picture is written: the file that was given, or the usual one.

    Raises UserError where its ending is no picture's, or its folder is a file.
    """
    path = Path(given) if given else usual
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--output {path} does not end as a picture does; give it one of {' '.join(PICTURES)}")
    in_the_way = next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None)
    if in_the_way or path.is_dir():
        raise UserError(f"cannot write {path}: {in_the_way or path} is {'no' if in_the_way else 'a'} folder")
    return path


def number(value: float) -> str:
    """A number with four significant digits, without needless noughts; 5e-05 is 5e-5, and thousands stand apart."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e4:
        return str(int(value))
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    return re.sub(r"e-0*", "e-", f"{value:.4g}")


def thin(points: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """At most about ``most`` of the points: the first, the last, lowest and highest of every stretch.  [N, 2]."""
    if len(points) <= most:
        return points
    stretches = np.array_split(np.arange(len(points)), most // 2)
    ends = [stretch[choose(points[stretch, 1])] for stretch in stretches for choose in (np.argmin, np.argmax)]
    return points[sorted({0, len(points) - 1, *ends})]


def curve(axes: Axes, pieces: Sequence[np.ndarray], color: str, *, name: str = "_", **look: Any) -> None:
    """A line with a gap between its pieces ([N, 2] each); without what is not finite; a lonely point is a dot."""
    known = [piece[np.isfinite(piece).all(axis=1)] for piece in pieces]
    most = max(8, MOST_POINTS // max(1, len(known)))
    parts = [np.vstack([thin(piece, most), [np.nan, np.nan]]) for piece in known if len(piece)]
    if parts:
        axes.plot(*np.vstack(parts).T, color=COLORS[color], label=name, clip_on=False, **look)
        alone = [piece[0] for piece in known if len(piece) == 1]
        axes.plot(*np.array(alone).reshape(-1, 2).T, "o", color=COLORS[color], markersize=4)


def finish(axes: Axes, x_name: str, y_name: str = "") -> None:
    """Ticks at round numbers, from 0 where the values are not far from it, names, and a legend where it is needed."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(lambda value, _: number(value))
    low, high = axes.dataLim.intervaly
    if low > 0 and (low < 0.7 * high or low == high):
        axes.dataLim.update_from_data_y([0], ignore=False)
    axes.autoscale_view()
    axes.set_xlabel(x_name, loc="right", style="italic")
    if y_name:
        axes.text(-0.14, 1.04, f"↑ {y_name}", transform=axes.transAxes, style="italic", fontsize=9.5)
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        axes.legend(handles, names, loc="upper left", bbox_to_anchor=(-0.02, -0.26), ncols=4, borderpad=0)


def say_nothing(axes: Axes, reason: str) -> None:
    """An empty panel that says why it is empty."""
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center")
    axes.set(xticks=[], yticks=[])
