"""A sustained run: without rest, by the clock, and as a curve."""

from __future__ import annotations

import pytest

from device_harness.devices.device import Condition
from device_harness.measuring.kept_speed import kept
from device_harness.measuring.protocol import measure_point
from device_harness.measuring.record import Point


def test_it_runs_as_long_as_it_was_asked_and_keeps_the_condition(site, play, clock):
    # A run takes 1.5 s: 0.5 s of prompt and ten steps of 0.1 s.
    hot = Condition(0, thermal_status=0, temperatures={"soc": 40.0})
    one = play("a", [0.1] * 500)
    (cell,) = measure_point(site([hot], runs=1, minutes=5), [one.arm()], 20, 11).cells
    points = cell.sustained
    assert points[0].seconds == 0 and points[-1].seconds == pytest.approx(298.5)
    assert len(points) == 200
    assert points[7].after["temperatures"] == {"soc": 40.0}
    assert len(cell.runs) == 3  # the curve's runs are points, and no runs that count
    assert not clock.slept


def test_a_failure_ends_the_curve_and_is_told(site, play):
    one = play("a", [*[0.1] * 8, "killed for memory"])
    (cell,) = measure_point(site(runs=1, minutes=5), [one.arm()], 20, 11).cells
    assert len(cell.sustained) == 5
    assert cell.runs[-1].outcome == "failed"
    assert cell.runs[-1].reason == "8 s into the sustained run: killed for memory"
    assert not one.opened[0].is_open


def test_what_is_kept_is_of_the_first_and_the_last_minute():
    curve = [
        Point(float(at), 1.0, 100.0 if at < 60 else 60.0 if at < 240 else 38.0) for at in range(300)
    ]
    found = kept(curve)
    assert (found.first, found.last, found.share) == (100.0, 38.0, 0.38)
    assert kept(curve[:100]) is None and kept([]) is None
