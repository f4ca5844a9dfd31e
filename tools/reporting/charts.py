"""Charts as inline SVG: small panels whose colours come from the page's style sheet, so they follow light and dark.

Each panel is 360 units wide, about as many as a phone has pixels, so that its words stay readable everywhere. Lines
are written as ``M x y L x y``: the page's script reads values back from them for the pointer (``data-x``, ``data-y``).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tools.reporting.html import Html, join, number, tag

WIDTH, HEIGHT = 360, 204
LEFT, RIGHT, TOP, BOTTOM = 46.0, 352.0, 20.0, 166.0
MOST_POINTS = 240  # of one line: more than the panel has places for
MOST_TITLES = 64  # points that carry their own tooltip
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """A line from values to places in the panel."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def data(self) -> str:
        """What the page's script needs to go back."""
        return f"{self.low!r} {self.high!r} {self.start} {self.stop}"


@dataclass(frozen=True)
class Curve:
    """One line of a panel. ``pieces`` are drawn apart; ``raw`` points stand faintly behind it.

    ``look`` is a class of the style sheet: s0 to s3, q1 to q4. ``shape``: line, steps, or dots (a line with its dots).
    """

    name: str
    pieces: Sequence[Points]
    look: str = "s1"
    shape: str = "line"
    raw: Points = ()

    @cached_property
    def points(self) -> list[tuple[float, float]]:
        """All points that can be drawn."""
        return [p for piece in self.pieces for p in finite(piece)]


@dataclass(frozen=True)
class Band:
    """A stage behind the lines, from one step to another."""

    name: str
    start: float
    stop: float


@dataclass(frozen=True)
class Panel:
    """What stands around the marks of a chart."""

    title: str
    unit: str = ""
    x_name: str = "optimiser step"
    y_name: str = ""
    bands: Sequence[Band] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None  # to widen by; 0 is in it unless the values are far from it
    legend: Mapping[str, str] = field(default_factory=dict)  # name -> look


def finite(points: Points) -> list[tuple[float, float]]:
    """The points that have a place: no NaN of a step that was skipped."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` of the points: the first, the last, and the lowest and highest of every stretch."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    start = 0
    for stretch in np.array_split(np.array([y for _, y in points]), max(1, most // 2)):
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
        start += len(stretch)
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that enclose ``low`` to ``high``."""
    if high <= low:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(
        power * m
        for m in (1, 2, 5, 10, 20)
        if math.ceil(high / (power * m) - 1e-9) - math.floor(low / (power * m) + 1e-9) <= most
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def scale_of(values: Iterable[float], start: float, stop: float, wide: tuple[float, float] | None) -> Scale:
    """The scale of an axis from round value to round value; it begins at 0 where the values are not far from it."""
    known = [value for value in values if math.isfinite(value)] + list(wide or ())
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if low > 0 and (low < 0.7 * high or low == high):
        low = 0.0
    marks = ticks(low, high, 4)
    return Scale(marks[0], marks[-1], start, stop)


def line_chart(panel: Panel, curves: Sequence[Curve], *, marked: tuple[float, float, str] | None = None) -> Html:
    """Curves over steps with the stages as bands; ``marked`` is a point with words."""
    points = [p for curve in curves for p in (*curve.points, *finite(curve.raw))]
    x = x_scale(panel, [p[0] for p in points])
    room = [1.15 * marked[1]] if marked else []  # for its words
    y = scale_of([*(p[1] for p in points), *room], BOTTOM, TOP, panel.y_range)
    marks = [_curve(curve, x, y) for curve in curves]
    if marked:
        at_x, at_y, words = marked
        place = {"x": _n(x(at_x)), "y": _n(y(at_y) - 8)}
        anchor = "end" if x(at_x) > (LEFT + RIGHT) / 2 else "start"
        marks.append(tag("circle", cx=place["x"], cy=_n(y(at_y)), r=4, class_="marked"))
        marks.append(tag("text", words, text_anchor=anchor, class_="marked", **place))
    legend = {curve.name: curve.look for curve in curves} if len(curves) > 1 else {}
    said = "; ".join(_said(curve) for curve in curves)
    return figure(panel, join(*marks), x, y, legend=legend | dict(panel.legend), said=said, readable=True)


def _said(curve: Curve) -> str:
    values = [p[1] for p in curve.points]
    if not values:
        return f"{curve.name}: no value"
    first, last, low, high = (number(v) for v in (values[0], values[-1], min(values), max(values)))
    return f"{curve.name}: from {first} to {last}, between {low} and {high}"


def x_scale(panel: Panel, values: Sequence[float]) -> Scale:
    """The scale of steps: exactly as wide as the bands, or as the values."""
    edges = [edge for band in panel.bands for edge in (band.start, band.stop)]
    known = [*(panel.x_range or ()), *edges] or [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(known), max(known)
    return Scale(low, high, LEFT, RIGHT) if high > low else Scale(low - 0.5, high + 0.5, LEFT, RIGHT)


def _curve(curve: Curve, x: Scale, y: Scale) -> Html:
    shown = []
    if curve.raw:
        shown.append(
            tag("path", d=path_of(thin(finite(curve.raw), 2 * MOST_POINTS), x, y), class_=f"raw {curve.look}")
        )
    share = MOST_POINTS / max(1, len(curve.points))
    pieces = [
        corners(finite(piece)) if curve.shape == "steps" else thin(finite(piece), max(8, int(share * len(piece))))
        for piece in curve.pieces
    ]
    d = "".join(path_of(piece, x, y) for piece in pieces if piece)
    shape = curve.shape if curve.shape == "steps" else None  # it has a value between its points
    shown.append(tag("path", d=d, class_=f"line {curve.look}", data_name=curve.name, data_shape=shape))
    alone = [p for piece in pieces if len(piece) == 1 for p in piece]  # no line leads to them
    shown.append(dots(thin(curve.points) if curve.shape == "dots" else alone, x, y, curve.look, titles=True))
    return join(*shown)


def corners(points: Points) -> list[tuple[float, float]]:
    """The points at which a value that stays for a while begins and ends, so that a line through them has steps."""
    kept: list[tuple[float, float]] = []
    for i, (place, value) in enumerate(points):
        if i and value != points[i - 1][1]:
            kept += [(place, points[i - 1][1]), (place, value)]
        elif i in (0, len(points) - 1):
            kept.append((place, value))
    return kept


def path_of(points: Points, x: Scale, y: Scale) -> str:
    """A line through the points."""
    return "M" + "L".join(f"{_n(x(a))} {_n(y(b))}" for a, b in points) if points else ""


def dots(points: Points, x: Scale, y: Scale, look: str, *, titles: bool = False) -> Html:
    """A dot at every point; a few of them say their values themselves."""
    if titles and len(points) <= MOST_TITLES:
        return join(
            *(
                tag("circle", tag("title", f"{number(a)}: {number(b)}"), cx=_n(x(a)), cy=_n(y(b)), r=3, class_=look)
                for a, b in points
            )
        )
    return tag("path", d="".join(f"M{_n(x(a))} {_n(y(b))}h0" for a, b in points), class_=f"dots {look}")


def scatter(panel: Panel, groups: Mapping[str, tuple[str, Points]], lines: Sequence[Curve] = ()) -> Html:
    """Groups of points (name -> look, points), and lines over them."""
    everything = [p for _, points in groups.values() for p in finite(points)]
    x = scale_of([p[0] for p in everything], LEFT, RIGHT, panel.x_range)
    y = scale_of([p[1] for p in everything], BOTTOM, TOP, panel.y_range)
    marks = [dots(finite(points), x, y, look) for look, points in groups.values()]
    marks += [_curve(line, x, y) for line in lines]
    legend = {line.name: line.look for line in lines} or {name: look for name, (look, _) in groups.items()}
    said = f"{len(everything)} points, {panel.y_name} against {panel.x_name}"
    return figure(panel, join(*marks), x, y, legend=legend | dict(panel.legend), said=said)


def histogram(panel: Panel, groups: Mapping[str, tuple[str, Sequence[float]]], *, bins: int = 20) -> Html:
    """How many values fall where, the groups (name -> look, values) on top of each other."""
    values = [v for _, group in groups.values() for v in group if math.isfinite(v)]
    x = scale_of(values, LEFT, RIGHT, panel.x_range)
    edges = np.linspace(x.low, x.high, bins + 1)
    counts = {name: np.histogram(np.clip(group, x.low, x.high), edges)[0] for name, (_, group) in groups.items()}
    y = scale_of([0, *np.sum(list(counts.values()), axis=0).tolist()], BOTTOM, TOP, None)
    marks, below = [], np.zeros(bins, dtype=np.int64)
    for name, heights in counts.items():
        boxes = "".join(
            f"M{_n(x(edges[i]) + 0.5)} {_n(y(below[i]))}H{_n(x(edges[i + 1]) - 0.5)}V{_n(y(below[i] + n))}"
            f"H{_n(x(edges[i]) + 0.5)}Z"
            for i, n in enumerate(heights)
            if n
        )
        marks.append(tag("path", d=boxes, class_=f"box {groups[name][0]}"))
        below = below + heights
    said = f"{len(values)} examples; the highest of {bins} bars counts {below.max()}"
    return figure(panel, join(*marks), x, y, legend={name: look for name, (look, _) in groups.items()}, said=said)


def figure(
    panel: Panel, marks: Html, x: Scale, y: Scale, *, legend: Mapping[str, str], said: str, readable: bool = False
) -> Html:
    """The marks with axes, title and legend; ``said`` is the chart in words."""
    svg = tag(
        "svg",
        _bands(panel.bands, x),
        _axes(panel, x, y),
        marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{panel.title}. {said}",
        data_x=x.data() if readable else None,
        data_y=y.data() if readable else None,
    )
    unit = tag("span", panel.unit, class_="unit") if panel.unit else None
    caption = tag("figcaption", tag("b", panel.title), " ", unit, tag("output", class_="read") if readable else None)
    return tag("figure", caption, svg, _legend(legend) if legend else None, class_="chart")


def _legend(looks: Mapping[str, str]) -> Html:
    swatch = {name: tag("span", class_=f"swatch {look}") for name, look in looks.items()}
    return tag("p", *(tag("span", swatch[name], name) for name in looks), class_="legend")


def _bands(bands: Sequence[Band], x: Scale) -> Html:
    shown = []
    for i, band in enumerate(bands):
        start, stop = x(band.start), x(band.stop)
        if i % 2:
            shown.append(
                tag("rect", x=_n(start), y=TOP, width=_n(stop - start), height=_n(BOTTOM - TOP), class_="band")
            )
        words = next((w for w, room in ((f"stage {band.name}", 46), (band.name, 12)) if stop - start >= room), None)
        if words and len(bands) > 1:
            shown.append(tag("text", words, x=_n((start + stop) / 2), y=TOP - 6, text_anchor="middle", class_="stage"))
    return join(*shown)


def _axes(panel: Panel, x: Scale, y: Scale) -> Html:
    shown = []
    for value in ticks(y.low, y.high, 4):
        if y.low <= value <= y.high:
            at = _n(y(value))
            shown.append(tag("path", d=f"M{LEFT} {at}H{RIGHT}", class_="axis" if value == y.low else "grid"))
            shown.append(tag("text", _tick(value), x=LEFT - 6, y=_n(y(value) + 3.8), text_anchor="end"))
    for value in ticks(x.low, x.high, 4):
        if x.low <= value <= x.high and (not panel.bands or value == int(value)):
            at = x(value)
            anchor = "end" if at > RIGHT - 12 else "middle"
            shown.append(tag("path", d=f"M{_n(at)} {BOTTOM}v4", class_="axis"))
            shown.append(tag("text", _tick(value), x=_n(min(at, RIGHT)), y=BOTTOM + 16, text_anchor=anchor))
    shown.append(tag("text", panel.x_name, x=RIGHT, y=HEIGHT - 6, text_anchor="end", class_="name"))
    if panel.y_name:
        shown.append(tag("text", f"↑ {panel.y_name}", x=2, y=TOP - 8, class_="name"))
    return join(*shown)


def _tick(value: float) -> str:
    if abs(value) >= 10_000 and value % 100 == 0:
        return f"{number(value / 1000)}k"
    return number(value)


def _n(value: float) -> str:
    """A place in the panel, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
