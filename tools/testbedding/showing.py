"""The testbed's results as a picture and as a page of one file."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pocl.common.files import write_text
from tools.reporting.drawings import COLORS, SHEET, STYLE
from tools.testbedding.arms import BASELINE, Arm
from tools.testbedding.comparing import COLUMNS, Row, notes, text_rows
from tools.testbedding.regimes import REGIMES

Rows = Mapping[str, Sequence[Row]]  # by regime


def picture(rows: Rows) -> Figure:
    """All arms of all regimes: differences to the baseline with their intervals."""
    names = list(dict.fromkeys(row.name for of_regime in rows.values() for row in of_regime if row.name != BASELINE))
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x", "axes.ymargin": 0.02, "axes.xmargin": 0.05}):
        figure = Figure(
            figsize=(3.2 + 2.9 * len(rows), 1.3 + 0.24 * len(names)), facecolor="white", layout="constrained"
        )
        for axes, (regime, of_regime) in zip(
            figure.subplots(1, len(rows), sharey=True, squeeze=False)[0], rows.items(), strict=True
        ):
            _draw(axes, names, of_regime)
            base = next((row.means["rouge_l"] for row in of_regime if row.name == BASELINE), float("nan"))
            axes.set_title(f"{regime}: {BASELINE} {base:.1f}", loc="left", fontsize=10.5)
        figure.supxlabel(f"ROUGE-L, difference to {BASELINE}, 95 % t-interval over seeds", fontsize=9.5)
    return figure


def _draw(axes: Axes, names: Sequence[str], rows: Sequence[Row]) -> None:
    axes.axvline(0.0, color=COLORS["quiet"], linewidth=1)
    for row in rows:
        if row.difference is None:
            continue
        mean, half = row.difference.mean, row.difference.half
        color = COLORS["s0"] if abs(mean) <= half else COLORS["s3"] if mean > 0 else COLORS["s2"]
        axes.errorbar(mean, names.index(row.name), xerr=half, fmt="o", color=color, markersize=4, capsize=2)
    axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))  # the panels stand close to each other
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def save(rows: Rows, arms: Sequence[Arm], folder: Path) -> list[Path]:
    """Write testbed.png and testbed.html -> their paths."""
    figure, svg = picture(rows), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / "testbed.png", dpi=130)
        figure.savefig(svg, format="svg")
    write_text(folder / "testbed.html", page(rows, arms, svg.getvalue()[svg.getvalue().index("<svg") :]))
    return [folder / "testbed.png", folder / "testbed.html"]


def page(rows: Rows, arms: Sequence[Arm], drawn: str) -> str:
    """The page: picture, a table a regime, the arms' flags."""
    parts = ["<header><h1>The testbed: arms of training at equal updates</h1></header><section>", drawn]
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in notes([row for of in rows.values() for row in of])]
    parts.append("</section>")
    for regime, of_regime in rows.items():
        parts.append(f"<section><h2>{regime}: {html.escape(REGIMES[regime].title)}</h2>")
        parts += [_table(COLUMNS, text_rows(of_regime)), "</section>"]
    parts.append("<section><h2>The arms, in flags of train.py</h2>")
    parts.append(_table(("arm", "flags"), [[arm.name, arm.text] for arm in arms]) + "</section>")
    head = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    style = f"<style>{SHEET} svg {{ max-width: 100%; height: auto; background: #fff }}</style>"
    return f"{head}<title>The testbed</title>{style}<body><main>{''.join(parts)}</main></body></html>\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in columns)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<div class=scroll><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"
