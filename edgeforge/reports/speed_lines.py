"""Speeds side by side as text of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from device_harness.measuring.record import Cell, Figure, lengths_text
from edgeforge.cards.figures import with_interval
from edgeforge.reports.paired import LETTERS
from edgeforge.reports.speeds import SpeedGroup, SpeedRatio, Speeds
from edgeforge.sizes import short, size_text

WIDTH: Final = 80
_LABEL, _COLUMN, _COLUMNS = 22, 14, 4
_ROWS: Final[tuple[tuple[Figure, str, float], ...]] = (
    ("prefill", "prefill, tokens/s", 1.0),
    ("decode", "decode, tokens/s", 1.0),
    ("first_token", "first token, ms", 1e3),
)
_MODULE_ROWS: Final[tuple[tuple[Figure, str, float], ...]] = (("decode", "calls/s", 1.0),)


def speed_lines(speeds: Speeds, *, named: bool) -> list[str]:
    """The speeds, a line each.

    Args:
        speeds: of some sides.
        named: whether a line for each letter stands above already.
    """
    return list(_lines(speeds, named=named))


def _lines(speeds: Speeds, *, named: bool) -> Iterator[str]:
    if not named:
        for letter, side in zip(LETTERS, speeds.sides, strict=False):
            yield from _wrapped(f"{letter}  ", side.name)
    for group in speeds.groups:
        yield ""
        lengths = lengths_text(group.prompt, group.output, group.shapes)
        where = f"{group.device.name}, {lengths}"
        emulated = "; emulated, so no speed" if group.device.is_emulated else ""
        yield from _wrapped("", f"{where} (medians of warm runs; * UNRELIABLE{emulated})")
        yield from _table(group)
        yield from _ratio_lines(group)
    if any(not each.by_turns for group in speeds.groups for each in group.ratios):
        yield ""
        yield from _wrapped(
            "",
            "What was not measured by turns differs by the device's day, too: `edgeforge bench A "
            "B` measures both in one go.",
        )


def _table(group: SpeedGroup) -> Iterator[str]:
    for start in range(0, len(group.cells), _COLUMNS):
        shown = group.cells[start : start + _COLUMNS]
        yield _row("", list(LETTERS[start : start + len(shown)]))
        for figure, label, factor in _MODULE_ROWS if group.shapes else _ROWS:
            yield _row(label, [_value(cell, figure, factor) for cell in shown])
        first = "call" if group.shapes else "token"
        yield _row(f"cold first {first}, ms", [_cold(cell) for cell in shown])
        yield _row("peak memory", [_peak(cell) for cell in shown])
        yield _row("outputs" if group.shapes else "text", [_text(cell) for cell in shown])


def _ratio_lines(group: SpeedGroup) -> Iterator[str]:
    for each in group.ratios:
        figure = "calls" if group.shapes else each.figure
        label = f"{LETTERS[each.side]} against {LETTERS[0]}, {figure}"
        yield f"  {label:<{_LABEL}}{ratio_text(each):<34}  {each.outcome}".rstrip()


def ratio_text(ratio: SpeedRatio) -> str:
    """A ratio with its interval, or how it came about without one."""
    text = with_interval(ratio.value, ratio.low, ratio.high, lambda value: f"{value:.3f}")
    return f"x {text}" if ratio.by_turns else f"x {text} (not by turns)"


def _value(cell: Cell | None, figure: Figure, factor: float) -> str:
    summary = None if cell is None else cell.summary(figure)
    if summary is None:
        return "" if cell is None else "failed" if cell.failed else "-"
    return f"{short(factor * summary.median)}{'' if summary.is_reliable else ' *'}"


def _cold(cell: Cell | None) -> str:
    cold = None if cell is None else cell.cold
    if cold is None or cold.first_token_seconds is None:
        return ""
    return short(1e3 * cold.first_token_seconds)


def _peak(cell: Cell | None) -> str:
    return "" if cell is None or not cell.peak_bytes else size_text(cell.peak_bytes)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.text.verdict == "not checked":
        return "not checked"
    return f"{cell.text.agreed} of {cell.text.of}"


def _row(label: str, cells: list[str]) -> str:
    return f"{label:<{_LABEL}}{''.join(f'{cell:>{_COLUMN}}' for cell in cells)}".rstrip()


def _wrapped(head: str, words: str) -> list[str]:
    return textwrap.wrap(
        words, WIDTH, initial_indent=head, subsequent_indent="   ", break_on_hyphens=False
    )
