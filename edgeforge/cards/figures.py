"""Figures as a card and a report write them."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgeforge.sizes import short


def number(value: float | None) -> str:
    """Three digits.

    >>> number(0.036249), number(0.000217), number(1334.6), number(float("nan")), number(None)
    ('0.0362', '2.17e-4', '1335', 'not a finite number', 'not a finite number')
    """
    if value is None or not math.isfinite(value):
        return "not a finite number"
    return short(value)


def ratio(value: float | None) -> str:
    """Four digits after the point, for what is near 1.

    >>> ratio(1.02843), ratio(446.2)
    ('1.0284', '446')
    """
    return number(value) if value is None or not abs(value) < 10 else f"{value:.4f}"


def share(value: float | None) -> str:
    """A share in percent.

    >>> share(0.91234)
    '91.2 %'
    """
    finite = value is not None and math.isfinite(value)
    return f"{100 * value:.1f} %" if finite and value is not None else number(None)


def with_interval(
    value: float | None, low: float | None, high: float | None, form: Callable[[float | None], str]
) -> str:
    """A figure and its interval, if there is one.

    >>> with_interval(0.03, 0.027, 0.033, number), with_interval(0.03, None, None, number)
    ('0.0300 [0.0270, 0.0330]', '0.0300')
    """
    known = all(each is not None and math.isfinite(each) for each in (low, high))
    return f"{form(value)} [{form(low)}, {form(high)}]" if known else form(value)
