"""Measures this process's memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path


def resident_peak() -> int:
    """The peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would give the parent process's peak where that is larger, because its value
        # survives exec.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def meminfo(name: str) -> int | None:
    """A line of ``/proc/meminfo``, in bytes, such as ``MemAvailable``; None where there is none."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
