"""A clock that nobody waits for, and the outermost edge of a device, played by a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from device_harness.devices.device import Condition
from device_harness.errors import DeviceError
from device_harness.measuring.lane import Arm, Site
from device_harness.measuring.record import Measured
from device_harness.measuring.rules import Rules
from device_harness.timed_run import TimedRun


class PlayedClock:
    """A clock that moves only when somebody waits by it, or runs something."""

    def __init__(self) -> None:
        self.time = 1_000_000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


class PlayedSession:
    """A process on a device: each timed run takes the script's next step, in seconds a token.

    A text in the script is how that run fails.
    """

    def __init__(self, play: Play) -> None:
        self._play = play
        self.runtime, self.limits = "played runtime 1.0 (1 thread)", ("It is played.",)
        self.processor = "CPU"
        self.is_open = True

    def load(self):
        return {"seconds": 0.5}

    def timed(self, prompt, output: int) -> TimedRun:
        assert self.is_open, "a closed process runs nothing"
        step = next(self._play.script)
        self._play.log.append(self._play.name)
        if isinstance(step, str):
            raise DeviceError(step)
        if isinstance(step, TimedRun):
            return step
        first = step * len(prompt) / 4
        self._play.clock.time += first + step * (output - 1)
        return TimedRun(len(prompt), first, (step,) * (output - 1), (7,) * output, 1000)

    def close(self) -> None:
        self.is_open = False


class Play:
    """An artifact on a device, played.

    Args:
        name: of the artifact.
        script: of its timed runs, through all of its processes.
        clock: that its runs move.
        log: to which each run adds the name.
    """

    def __init__(
        self,
        name: str,
        script: Sequence[float | str | TimedRun],
        clock: PlayedClock,
        log: list[str],
    ) -> None:
        self.name, self.clock, self.log = name, clock, log
        self.script: Iterator[float | str | TimedRun] = iter(script)
        self.opened: list[PlayedSession] = []
        self.refuses = ""

    def open(self) -> PlayedSession:
        if self.refuses:
            raise DeviceError(self.refuses)
        self.opened.append(PlayedSession(self))
        return self.opened[-1]

    def arm(self, **changes: object) -> Arm:
        measured = Measured(self.name, "onnx", "int4", "m", "c" * 64, self.name * 64, 64, 4.5, 10)
        return Arm(measured, self.open, lambda count: np.zeros(count, np.int64), **changes)


@pytest.fixture
def clock() -> PlayedClock:
    return PlayedClock()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def play(clock, log) -> Callable[..., Play]:
    return lambda name, script: Play(name, script, clock, log)


@pytest.fixture
def site(clock) -> Callable[..., Site]:
    def made(conditions: Sequence[Condition] | None = None, **rules: object) -> Site:
        """A device in these conditions, one a look; the last one stays. None cannot be asked."""
        left = list(conditions or ())

        def look() -> Condition | None:
            return (left.pop(0) if len(left) > 1 else left[0]) if left else None

        return Site("played", look, Rules(**rules), clock)

    return made
