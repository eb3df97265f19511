"""Speeds as ratios to a reference that runs in the same job, turn by turn.

A speed in tokens a second says more about the machine of the day than about an artifact. A ratio of
two that ran side by side does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from device_harness.timing import Timings, time_artifact
from edgeforge.gate.metrics import DECODE
from edgeforge.gate.policy import Ratio
from edgeforge.gate.result import Finding
from edgeforge.stage_progress import Progress
from edgeforge.verification.bounds import Bound, decide

# The smallest and the largest of six hold the median 1 - 2 / 2^6 = 96.9 times in 100, whatever the
# distribution is.
ROUNDS = 6


def held_ratios(
    folder: Path,
    ratios: Mapping[str, Ratio],
    threads: int | None,
    options: Mapping[str, str | None],
    progress: Progress,
) -> Iterator[Finding]:
    """Times an artifact and its reference by turns, and holds the ratios against their bounds.

    Args:
        folder: the artifact.
        ratios: by the figure's name.
        threads: of the runtimes; None for their defaults.
        options: of the runtimes.
        progress: told of each round.

    Raises:
        DeviceError: one of the two cannot run.
        ExportError: the reference is no artifact.
    """
    measured: dict[Path, list[tuple[Timings, Timings]]] = {}
    for name, ratio in ratios.items():
        if ratio.against not in measured:
            measured[ratio.against] = _rounds(folder, ratio.against, threads, options, progress)
        found = [_speed(own, name) / _speed(other, name) for own, other in measured[ratio.against]]
        bound = Bound(name, ratio.at_least, "at least")
        where = (f"against {ratio.against}", f"{ROUNDS} rounds by turns")
        checked = decide(bound, median(found), (min(found), max(found)), where=where)
        yield Finding.of(checked, "reference", ratio.source)


def _rounds(
    folder: Path,
    against: Path,
    threads: int | None,
    options: Mapping[str, str | None],
    progress: Progress,
) -> list[tuple[Timings, Timings]]:
    found = []
    for index in range(ROUNDS):
        progress("time", index, ROUNDS)
        pair = (folder, against)
        # Whoever runs second finds a warmer machine.
        order = pair if index % 2 == 0 else pair[::-1]
        timed = {each: time_artifact(each, threads=threads, options=options) for each in order}
        for timings in timed.values():
            timings.require_finite()
        found.append((timed[folder], timed[against]))
    return found


def _speed(timings: Timings, name: str) -> float:
    if name == DECODE:
        return timings.decode_tokens_per_second
    return timings.prefill_tokens_per_second
