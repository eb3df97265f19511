"""Draws divergence against bits a weight, a panel for each model, as a small SVG file."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

Point = tuple[float, float]
"""Bits a weight and mean KL, nats per token."""

WIDTH: Final = 320
HEIGHT: Final = 300
MARGIN: Final = 46  # room for the axes' numbers
LOWEST: Final = 3.9
HIGHEST: Final = 6.4  # formats of 8 bits are left out


@dataclass(frozen=True)
class Series:
    """Points of one side.

    Attributes:
        title: for the legend.
        color: as SVG writes it.
        points: bits and divergence by name.
        joined: whether a line joins the points that no other one beats at fewer bits.
    """

    title: str
    color: str
    points: Mapping[str, Point]
    joined: bool


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other one beats at no more bits, by rising bits.

    >>> front([(4.5, 0.2), (4.0, 0.3), (4.6, 0.25)])
    [(4.0, 0.3), (4.5, 0.2)]
    """
    found: list[Point] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def picture(panels: Mapping[str, Sequence[Series]]) -> str:
    """Returns the SVG text.

    Args:
        panels: the series by the model's title; all panels have the same sides.
    """
    width, height = WIDTH * max(1, len(panels)), HEIGHT + 60
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">',
        "<title>Mean KL from FLOAT against bits a weight</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, (title, series) in enumerate(panels.items()):
        lines.append(f'<g transform="translate({index * WIDTH} 0)">')
        lines += _panel(title, series)
        lines.append("</g>")
    legend = next(iter(panels.values()), [])
    at = MARGIN
    for one in legend:
        lines.append(f'<circle cx="{at}" cy="{height - 12}" r="4" fill="{one.color}"/>')
        lines.append(f'<text x="{at + 8}" y="{height - 8}">{escape(one.title)}</text>')
        at += 30 + 6 * len(one.title)
    return "\n".join([*lines, "</svg>", ""])


def _panel(title: str, series: Sequence[Series]) -> Iterator[str]:
    shown = [
        point for one in series for point in one.points.values() if LOWEST <= point[0] <= HIGHEST
    ]
    values = [kl for _, kl in shown if kl > 0] or [1.0]
    low = math.floor(math.log10(min(values)) * 2) / 2
    high = max(low + 0.5, math.ceil(math.log10(max(values)) * 2) / 2)
    right, bottom = WIDTH - 12, HEIGHT - 20

    def x(bits: float) -> float:
        return round(MARGIN + (bits - LOWEST) / (HIGHEST - LOWEST) * (right - MARGIN), 1)

    def y(kl: float) -> float:
        return round(30 + (high - math.log10(kl)) / (high - low) * (bottom - 30), 1)

    yield f'<text x="{MARGIN}" y="18" font-size="13">{escape(title)}</text>'
    yield from _axes(x, y, low, high, right, bottom)
    for one in series:
        points = {
            name: point
            for name, point in one.points.items()
            if LOWEST <= point[0] <= HIGHEST and point[1] > 0
        }
        if one.joined:
            joined = " ".join(f"{x(bits)},{y(kl)}" for bits, kl in front([*points.values()]))
            yield f'<polyline points="{joined}" fill="none" stroke="{one.color}"/>'
        for name, (bits, kl) in points.items():
            about = escape(f"{name}: {bits:.2f} bits, KL {kl:.3g}")
            yield (
                f'<circle cx="{x(bits)}" cy="{y(kl)}" r="3.5" fill="{one.color}">'
                f"<title>{about}</title></circle>"
            )
            if not one.joined:
                label = escape(name)
                yield (
                    f'<text x="{x(bits) + 6}" y="{y(kl) + 3}" font-size="8" fill="{one.color}">'
                    f"{label}</text>"
                )


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    low: float,
    high: float,
    right: int,
    bottom: int,
) -> Iterator[str]:
    for bits in (4.0, 4.5, 5.0, 5.5, 6.0):
        yield (
            f'<line x1="{x(bits)}" y1="30" x2="{x(bits)}" y2="{bottom}" stroke="#ddd"/>'
            f'<text x="{x(bits)}" y="{bottom + 14}" text-anchor="middle">{bits:g}</text>'
        )
    exponent = low
    while exponent <= high + 1e-9:
        kl = 10**exponent
        yield (
            f'<line x1="{MARGIN}" y1="{y(kl)}" x2="{right}" y2="{y(kl)}" stroke="#ddd"/>'
            f'<text x="{MARGIN - 4}" y="{y(kl) + 4}" text-anchor="end">{kl:.2g}</text>'
        )
        exponent += 0.5
    yield f'<text x="{right}" y="{bottom + 28}" text-anchor="end">bits a weight</text>'
    yield '<text x="4" y="18">KL</text>'


def write_picture(file: Path, panels: Mapping[str, Sequence[Series]]) -> None:
    """Writes the picture."""
    file.write_text(picture(panels), encoding="utf-8")
