"""Cool-down: waited for, not for ever, and never assumed."""

from __future__ import annotations

import pytest

from device_harness.devices.device import Condition
from device_harness.measuring.conditions import ClockLimits, cool_down, coolness
from device_harness.measuring.rules import Rules


def looks(*conditions):
    left = list(conditions)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


@pytest.mark.parametrize(
    ("condition", "rules", "cool"),
    [
        (None, {}, "unknown"),
        (Condition(0), {}, "unknown"),
        (Condition(0, temperatures={"soc": 90.0}), {}, "unknown"),  # nobody said how warm it may be
        (Condition(0, thermal_status=0), {}, "cool"),
        (Condition(0, thermal_status=1), {}, "not cool"),
        (Condition(0, thermal_status=1), {"coolest_status": 1}, "cool"),
        (Condition(0, thermal_status=0), {"cool_to": 30.0}, "unknown"),
        (Condition(0, thermal_status=2), {"cool_to": 30.0}, "not cool"),
        (Condition(0, temperatures={"a": 29.0, "b": 31.0}), {"cool_to": 30.0}, "not cool"),
        (Condition(0, temperatures={"a": 29.0, "b": 30.0}), {"cool_to": 30.0}, "cool"),
    ],
)
def test_what_a_device_does_not_say_is_unknown(condition, rules, cool):
    assert coolness(condition, Rules(**rules)) == cool


def test_it_waits_until_the_device_is_cool(clock):
    warm = [Condition(0, thermal_status=status) for status in (3, 2, 1, 0)]
    rested = cool_down(looks(*warm), Rules(rest=10), clock)
    assert (rested.cool, rested.condition.thermal_status) == ("cool", 0)
    assert rested.waited == sum(clock.slept) and clock.slept[0] == 10


def test_it_waits_no_longer_than_it_may(clock):
    rested = cool_down(looks(Condition(0, thermal_status=3)), Rules(longest_wait=61), clock)
    assert rested.cool == "not cool"
    assert rested.waited == sum(clock.slept) == 61


@pytest.mark.parametrize("rest", [0.0, 5.0])
def test_a_device_that_says_nothing_is_not_waited_for(clock, rest):
    rested = cool_down(lambda: None, Rules(rest=rest), clock)
    assert (rested.cool, rested.waited, rested.condition) == ("unknown", rest, None)


@pytest.mark.parametrize(("limit", "drops"), [(1_700, False), (1_699, True), (2_500, False)])
def test_a_clock_drops_by_more_than_fifteen_percent_of_the_best_it_had(limit, drops):
    limits = ClockLimits()
    for seen in (1_000, 2_000, 1_900):
        limits.see(Condition(0, clock_limits={"cpu0": seen, "cpu1": 1_000}))
    found = limits.dropped(Condition(0, clock_limits={"cpu0": limit, "cpu1": 1_000}))
    assert bool(found) is drops
    assert not drops or "cpu0" in found


def test_cores_that_are_not_told_did_not_drop():
    limits = ClockLimits({"cpu0": 2_000})
    assert limits.dropped(None) == limits.dropped(Condition(0)) == ""
    assert limits.dropped(Condition(0, clock_limits={"cpu7": 1})) == ""
