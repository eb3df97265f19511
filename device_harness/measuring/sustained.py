"""A sustained run: one run after the other without a rest, as heat slows a device down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from device_harness.errors import DeviceError
from device_harness.measuring.lane import Lane
from device_harness.measuring.record import Figure, Point, Run

_FIGURES: Final[tuple[Figure, ...]] = ("prefill", "decode")


def sustain(lane: Lane, tell: Callable[[int, int], None]) -> tuple[Point, ...]:
    """Runs an arm again and again for as many minutes as the rules say.

    A run that fails is kept among the arm's runs, and ends the series.

    Args:
        lane: the arm, warm.
        tell: is told how many seconds are done, and of how many.
    """
    lane.begin()
    if lane.has_ended:
        return ()
    clock, points = lane.site.clock, list[Point]()
    lane.site.rest()
    begun, lasts = clock.now(), 60 * lane.site.rules.minutes
    while (seconds := clock.now() - begun) < lasts:
        tell(int(seconds), int(lasts))
        try:
            run = lane.filled(Run("warm", "counted", clock.now()), lane.timed())
        except DeviceError as error:
            reason = f"{seconds:.0f} s into the sustained run: {error}"
            lane.fail(Run("warm", "failed", clock.now(), reason=reason))
            break
        prefill, decode = (run.figure(name, lane.cell.prompt) for name in _FIGURES)
        if prefill is None or decode is None:
            break
        after = lane.site.look()
        points.append(Point(seconds, prefill, decode, None if after is None else after.as_json()))
    return tuple(points)
