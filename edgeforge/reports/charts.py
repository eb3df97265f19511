"""Charts as inline SVG whose colours are the page's, so that they follow light and dark."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from edgeforge.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib draws in these; each becomes a variable of the page's style sheet.
_INK, _LINE, _FRONT = "#010203", "#040506", "#070809"
_SERIES: Final = tuple(f"#1{index}1{index}1{index}" for index in range(8))
_VARIABLES: Final = {
    _INK: "var(--ink)",
    _LINE: "var(--line)",
    _FRONT: "var(--ink)",
    **{color: f"var(--series-{index})" for index, color in enumerate(_SERIES)},
}
_DASHES: Final = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Point:
    """An artifact in a chart of accuracy against bytes.

    Attributes:
        name: its letter.
        bytes: of all its files.
        kl: nats a token.
        low: the lower end of its interval; None where there is none.
        high: the upper end.
        peer: whether it is a format of other tools, known by its figures alone.
    """

    name: str
    bytes: float
    kl: float
    low: float | None = None
    high: float | None = None
    peer: bool = False


@dataclass(frozen=True)
class Curve:
    """A line: means by position."""

    name: str
    positions: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Spread:
    """A value with its interval, on a line of its own."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both bytes and KL, the smallest first.

    >>> [p.name for p in front([Point("a", 2, 1), Point("b", 1, 3), Point("c", 3, 2)])]
    ['b', 'a']
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.bytes, each.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def accuracy_chart(points: Sequence[Point], title: str) -> str:
    """KL against bytes, with the Pareto front, as SVG."""
    figure, axes = _axes("size of all files, MB", "KL from FLOAT, nats a token")
    best = front([point for point in points if not point.peer])
    if len(best) > 1:
        axes.plot(
            [point.bytes / 1e6 for point in best],
            [point.kl for point in best],
            color=_FRONT,
            linestyle=":",
            linewidth=1.2,
        )
    peers = sorted((each for each in points if each.peer), key=lambda each: (each.bytes, each.kl))
    for point in points:
        known = point.low is not None and point.high is not None
        spread: Any = [
            [max(0.0, point.kl - (point.low or 0))],
            [max(0.0, (point.high or 0) - point.kl)],
        ]
        color = _LINE if point.peer else _SERIES[0]
        x = point.bytes / 1e6
        axes.errorbar(
            [x],
            [point.kl],
            yerr=spread if known else None,
            fmt="x" if point.peer else "o" if point in best else "s",
            color=_INK if point.peer else color,
            markersize=6,
            capsize=3,
        )
        axes.annotate(
            point.name,
            (x, point.kl),
            textcoords="offset points",
            # Neighbours' names are put above and below in turn.
            xytext=(7, -13 if point.peer and peers.index(point) % 2 == 0 else 5),
            color=_INK,
            fontsize=9 if point.peer else 11,
        )
    if all(point.kl > 0 for point in points):
        axes.set_yscale("log")
    axes.margins(x=0.12)
    return _svg(figure, title)


def curve_chart(curves: Sequence[Curve], title: str) -> str:
    """KL along a block, a line an artifact, as SVG."""
    figure, axes = _axes("position in the block, tokens", "KL, nats a token")
    for index, curve in enumerate(curves):
        axes.plot(
            curve.positions,
            curve.values,
            color=_SERIES[index % len(_SERIES)],
            linestyle=_DASHES[(index // len(_SERIES)) % len(_DASHES)],
            label=curve.name,
            linewidth=1.6,
        )
    if all(value > 0 for curve in curves for value in curve.values):
        axes.set_yscale("log")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=10, ncols=4)
    return _svg(figure, title)


def ratio_chart(rows: Sequence[Spread], title: str) -> str:
    """Ratios and their intervals, a line each, around 1, as SVG."""
    figure, axes = _axes("times as fast", "", height=1.1 + 0.32 * len(rows))
    axes.axvline(1, color=_LINE, linewidth=1.6)
    for place, row in enumerate(rows):
        ends = (row.low or row.value, row.high or row.value)
        spread: Any = [[row.value - ends[0]], [ends[1] - row.value]]
        axes.errorbar(
            [row.value], [place], xerr=spread, fmt="o", color=_SERIES[0], markersize=6, capsize=3
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=_INK, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return _svg(figure, title)


def sustained_chart(curves: Sequence[Curve], title: str) -> str:
    """Decode over the minutes of a sustained run, a line each, as SVG."""
    figure, axes = _axes("minutes without a rest", "decode, tokens/s")
    for index, curve in enumerate(curves):
        axes.plot(
            [seconds / 60 for seconds in curve.positions],
            curve.values,
            color=_SERIES[index % len(_SERIES)],
            linestyle=_DASHES[(index // len(_SERIES)) % len(_DASHES)],
            label=curve.name,
            linewidth=1.6,
        )
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=10, ncols=2)
    return _svg(figure, title)


def _axes(x: str, y: str, height: float = 3.6) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UsageError(
            "the page's charts need matplotlib, which is not installed: pip install \"edgeforge"
            '[report]"'
        ) from None
    figure = Figure(figsize=(7.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.tick_params(which="both", color=_LINE, labelcolor=_INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page.

    Args:
        figure: drawn in the colours above.
        title: a plain sentence for those who do not see it.
    """
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "inherit", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    # Several charts share a page, and ids must not.
    mark = f"c{zlib.crc32(title.encode()):x}-"
    text = re.sub(r'\bid="', f'id="{mark}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{mark}", text)
    label = title.replace("&", "and").replace('"', "'").replace("<", "").replace(">", "")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
