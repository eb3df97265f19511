"""`Rules`: how often an artifact is run, what is waited for before, and what excludes a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

from device_harness.measuring.statistics import LARGEST_SPREAD

LARGEST_CLOCK_DROP: Final = 0.15
RUNS: Final = 6


@dataclass(frozen=True)
class Rules:
    """How a cell is measured.

    Attributes:
        runs: warm runs that count.
        warm_up: runs after the cold one that do not.
        rest: seconds to leave a device alone before each warm run.
        cool_to: degrees Celsius that no zone may exceed before a warm run; None for any.
        coolest_status: thermal status of Android that it may have then, 0 (none) to 6.
        longest_wait: seconds to wait for that, at most.
        minutes: of a sustained run after the others; 0 for none.
    """

    runs: int = RUNS
    warm_up: int = 1
    rest: float = 0.0
    cool_to: float | None = None
    coolest_status: int = 0
    longest_wait: float = 600.0
    minutes: float = 0.0

    def to_json(self) -> dict[str, object]:
        """The rules as ``bench.json`` holds them, with those that no option changes."""
        return {
            **asdict(self),
            "largest_spread": LARGEST_SPREAD,
            "largest_clock_drop": LARGEST_CLOCK_DROP,
        }
