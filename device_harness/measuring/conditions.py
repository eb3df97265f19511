"""Whether a device is cool, and whether it slowed its clocks; what it does not say is not known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from device_harness.devices.device import Condition
from device_harness.measuring.clock import Clock
from device_harness.measuring.rules import LARGEST_CLOCK_DROP, Rules

Cool = Literal["cool", "not cool", "unknown"]
LOOK_SECONDS: Final = 2.0
"""How long to leave a warm device alone before it is looked at again."""


def coolness(condition: Condition | None, rules: Rules) -> Cool:
    """Whether a device is as cool as the rules want it.

    A temperature that is asked for and not told is not known, though the thermal status be fine.

    >>> coolness(Condition(0, thermal_status=0), Rules())
    'cool'
    >>> coolness(Condition(0, temperatures={"battery": 41.5}), Rules(cool_to=38))
    'not cool'
    >>> coolness(Condition(0), Rules()), coolness(Condition(0, thermal_status=0), Rules(cool_to=38))
    ('unknown', 'unknown')
    """
    if condition is None:
        return "unknown"
    status, hottest = condition.thermal_status, max(condition.temperatures.values(), default=None)
    if status is not None and status > rules.coolest_status:
        return "not cool"
    if rules.cool_to is not None:
        if hottest is None:
            return "unknown"
        return "cool" if hottest <= rules.cool_to else "not cool"
    return "unknown" if status is None else "cool"


@dataclass(frozen=True)
class Rested:
    """How a device was when a run began.

    Attributes:
        condition: then; None where the device cannot be asked.
        cool: as the rules have it.
        waited: seconds.
    """

    condition: Condition | None
    cool: Cool
    waited: float


def cool_down(look: Callable[[], Condition | None], rules: Rules, clock: Clock) -> Rested:
    """Leaves a device alone until it is as cool as the rules want it, or for the longest wait.

    A device that does not say how warm it is is left alone for ``rest`` and no longer.
    """
    begun = clock.now()
    if rules.rest > 0:
        clock.sleep(rules.rest)
    while True:
        condition = look()
        cool, waited = coolness(condition, rules), clock.now() - begun
        left = rules.longest_wait - waited
        if cool != "not cool" or left <= 0:
            return Rested(condition, cool, waited)
        clock.sleep(min(LOOK_SECONDS, left))


@dataclass
class ClockLimits:
    """The highest clocks that a device has allowed since a measurement began, by core."""

    best: dict[str, int] = field(default_factory=dict)

    def see(self, condition: Condition | None) -> None:
        """Takes in how the device is."""
        for core, limit in _limits(condition).items():
            self.best[core] = max(limit, self.best.get(core, 0))

    def dropped(self, condition: Condition | None) -> str:
        """Says which core's limit fell too far, and by how much; empty where none did.

        >>> limits = ClockLimits({"cpu0": 2_000_000_000})
        >>> limits.dropped(Condition(0, clock_limits={"cpu0": 1_500_000_000}))
        'the clock of cpu0 was limited to 1.50 GHz, 25 % below the 2.00 GHz it had'
        """
        shares = {
            core: limit / self.best[core]
            for core, limit in _limits(condition).items()
            if self.best.get(core)
        }
        core = min(shares, key=lambda each: shares[each], default="")
        if not core or shares[core] >= 1 - LARGEST_CLOCK_DROP:
            return ""
        limit, best = _limits(condition)[core] / 1e9, self.best[core] / 1e9
        return (
            f"the clock of {core} was limited to {limit:.2f} GHz, {100 * (1 - shares[core]):.0f} % "
            f"below the {best:.2f} GHz it had"
        )


def _limits(condition: Condition | None) -> Mapping[str, int]:
    return {} if condition is None else condition.clock_limits
