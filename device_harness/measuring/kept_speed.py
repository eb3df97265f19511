"""How much of its speed a device keeps in a sustained run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from device_harness.measuring.record import Point

_END_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Kept:
    """How much of its speed a device keeps.

    Attributes:
        first: tokens a second, the median of the first minute.
        last: of the last minute.
    """

    first: float
    last: float

    @property
    def share(self) -> float:
        """The last over the first."""
        return self.last / self.first


def kept(points: Sequence[Point]) -> Kept | None:
    """How decode changed from the first minute of a series to the last; None of a shorter one.

    >>> kept([Point(0, 1, 50.0), Point(30, 1, 48.0), Point(130, 1, 30.0)]).share
    0.6122448979591837
    """
    if not points or points[-1].seconds < 2 * _END_SECONDS:
        return None
    end = points[-1].seconds
    first = [each.decode for each in points if each.seconds < _END_SECONDS]
    last = [each.decode for each in points if each.seconds > end - _END_SECONDS]
    return Kept(median(first), median(last))
