"""Numbers and sizes as people read and write them."""

from __future__ import annotations

import math
import re

from edgeforge.errors import UsageError


def size_text(size: int) -> str:
    """Returns a number of bytes as text with a decimal unit.

    >>> size_text(638_500_864), size_text(999)
    ('638.5 MB', '999 B')
    """
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.2f} {unit}" if unit == "GB" else f"{size / factor:.1f} {unit}"
    return f"{size} B"


def parse_size(text: str) -> int:
    """Returns the bytes of a size with a decimal unit (GB) or a binary one (GiB), or with none.

    >>> parse_size("1.5GB"), parse_size("2 GiB"), parse_size("900")
    (1500000000, 2147483648, 900)

    Raises:
        UsageError: the text is not a size, or the size is zero.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kMGT])(i?))?B?\s*", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is not a size: write it like 900MB, 3GB or 1.5GiB")
    power = " kMGT".index(match[2] or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def short(value: float) -> str:
    """Three digits, in at most seven characters.

    >>> short(0.036249), short(0.000217), short(1334.6), short(0)
    ('0.0362', '2.17e-4', '1335', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
    digits, power = f"{value:.2e}".split("e")
    return f"{digits}e{int(power)}"
