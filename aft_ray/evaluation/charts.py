"""Charts as inline SVG that follow the page's colours.

matplotlib draws with marker colours, which are then replaced by the page's CSS variables (`#010101` by
`var(--ink)`), so one drawing serves light, dark and print. Text stays text. Ids get the chart's name in front, since
several drawings share a page. Series differ by marker or dash as well as by colour.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {
    color: f"--series-{number}" for number, color in enumerate(SERIES, start=1)
}
MARKERS, DASHES = ("o", "s", "D", "^"), ("-", "--", ":", "-.")
WIDTH_INCHES = 5.0
LEGEND_CHARACTERS = 50
"""How many characters the names of up to three series may have on one line of the legend."""
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aft_ray",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One mean with its interval, drawn in the row `row` of an interval chart."""

    row: str
    series: str
    mean: float
    low: float | None
    high: float | None


def interval_chart(name: str, label: str, points: Sequence[Point], x_label: str, *, log: bool = False) -> str:
    """Draw dots with 95 % intervals, one line of the chart per `row`. Screen readers read `label`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows, series = _unique([p.row for p in points]), _unique([p.series for p in points])
    with rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH_INCHES, 0.9 + len(rows) * (0.32 + 0.2 * len(series))), layout="constrained")
        axes = figure.subplots()
        for number, one in enumerate(series):
            mine = [point for point in points if point.series == one]
            offset = (number + 1.8) / (len(series) + 1.7)  # below the row's name
            _draw_points(axes, mine, [rows.index(point.row) + offset for point in mine], number, one)
        _name_rows(axes, rows)
        if log:
            _log_scale(axes)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
        if len(series) > 1:
            num_columns = 3 if sum(map(len, series)) <= LEGEND_CHARACTERS else 1
            figure.legend(loc="outside upper left", ncols=num_columns, columnspacing=1, handletextpad=0.4)
        return _inline(figure, name, label)


def line_chart(
    name: str, label: str, curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> str:
    """Draw one line of (x, y) per curve."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(SETTINGS):
        figure = Figure(figsize=(WIDTH_INCHES, 2.6), layout="constrained")
        axes = figure.subplots()
        for number, (curve, points) in enumerate(curves.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            marker = MARKERS[number % len(MARKERS)] if len(points) < 2 else ""
            axes.plot(xs, ys, color=_color(number), linestyle=DASHES[number % 4], marker=marker, label=curve, lw=1.8)
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside upper left", ncols=3)
        return _inline(figure, name, label)


def _draw_points(axes: Axes, points: Sequence[Point], ys: Sequence[float], number: int, label: str) -> None:
    errors = [[_gap(p.mean, p.low) for p in points], [_gap(p.high, p.mean) for p in points]]
    axes.errorbar(
        [point.mean for point in points],
        ys,
        xerr=errors,
        fmt=MARKERS[number % len(MARKERS)],
        color=_color(number),
        label=label,
        capsize=3,
        markersize=6,
    )


def _name_rows(axes: Axes, rows: Sequence[str]) -> None:
    """Write each row's name above its points, so that long names take no width away."""
    for number, row in enumerate(rows):
        axes.text(0, number + 0.08, row, transform=axes.get_yaxis_transform(), va="top", ha="left")
    axes.set_ylim(len(rows), 0)  # the first row on top
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _gap(upper: float | None, lower: float | None) -> float:
    return 0.0 if upper is None or lower is None else max(0.0, upper - lower)


def _color(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _inline(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an <svg> element whose ids do not clash with other charts of the page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)  # its style would apply to the whole page
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return _opening(svg, label)


def _opening(svg: str, label: str) -> str:
    """Return a new opening tag, which lets the page size the chart and a screen reader describe it as one picture."""
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    rest = svg[svg.index(">", view_box.end()) + 1 :]
    return f'<svg viewBox="{view_box[1]}" role="img" aria-label={quoteattr(label)}>{rest}'
