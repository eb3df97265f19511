"""A comparison as text of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from edgeforge.cards.figures import number, share, with_interval
from edgeforge.gate.metrics import SHARES
from edgeforge.reports.paired import FIGURES, LETTERS, Compared, Comparison, Difference
from edgeforge.reports.speed_lines import speed_lines
from edgeforge.sizes import size_text

WIDTH = 80
_LABEL, _COLUMN, _COLUMNS = 22, 14, 4


def text_lines(comparison: Comparison) -> list[str]:
    """The comparison, a line each."""
    return list(_lines(comparison))


def _lines(comparison: Comparison) -> Iterator[str]:
    artifacts, speeds = comparison.artifacts, comparison.speeds
    if artifacts:
        yield from _accuracy_lines(comparison)
    if speeds is not None:
        yield from speed_lines(speeds, named=bool(artifacts))


def _accuracy_lines(comparison: Comparison) -> Iterator[str]:
    artifacts = comparison.artifacts
    for letter, each in zip(LETTERS, artifacts, strict=False):
        assert each.report is not None
        words = f"{each.folder}: {each.label}, {each.report.tokens:,} tokens of {each.report.text}"
        yield from _wrapped(f"{letter}  ", words)
    for start in range(0, len(artifacts), _COLUMNS):
        shown = artifacts[start : start + _COLUMNS]
        yield ""
        yield _row("", LETTERS[start : start + len(shown)])
        yield _row("size", [size_text(each.bytes) for each in shown])
        yield _row("bits a weight", [f"{each.manifest.bits_per_weight:.3f}" for each in shown])
        for figure in FIGURES:
            yield _row(figure.label, [figure.form(figure.of(each).value) for each in shown])
    for place in range(1, len(artifacts)):
        yield ""
        title = f"{LETTERS[place]} against {LETTERS[0]}"
        if place in comparison.apart:
            yield from _wrapped(f"{title}: ", f"not compared, as {comparison.apart[place]}")
            continue
        yield f"{title}, on the same tokens"
        for figure in FIGURES:
            (found,) = (
                each
                for each in comparison.differences
                if each.artifact == place and each.figure == figure.name
            )
            yield f"  {figure.label:<{_LABEL}}{change_text(figure, found):<36}  {found.outcome}"
    yield ""
    yield from _wrapped("", "KL is in nats a token. Perplexities are compared by their ratio.")
    if comparison.differences:
        yield from _wrapped(
            "",
            "[ ] are intervals of the paired difference, by a bootstrap of the blocks of the text, "
            "which hold all together with 95 %. Where 0 (a ratio: 1) lies inside, the two are not "
            "told apart.",
        )


def change_text(figure: Compared, found: Difference) -> str:
    """A difference and its interval, such as ``+0.0012 [+0.0010, +0.0014]``."""
    if figure.is_log:
        return with_interval(found.change, found.low, found.high, lambda value: f"x {value:.4f}")

    def signed(value: float | None) -> str:
        sign = "+" if value is not None and value > 0 else ""
        return sign + (share(value) if figure.name in SHARES else number(value))

    return with_interval(found.change, found.low, found.high, signed)


def _row(label: str, cells: str | list[str]) -> str:
    return f"{label:<{_LABEL}}{''.join(f'{cell:>{_COLUMN}}' for cell in cells)}".rstrip()


def _wrapped(head: str, words: str) -> list[str]:
    return textwrap.wrap(
        words, WIDTH, initial_indent=head, subsequent_indent="   ", break_on_hyphens=False
    )
