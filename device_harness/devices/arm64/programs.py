"""Runs a program that asks nobody anything, and keeps what it prints."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence


def run_program(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, whatever its exit code is.

    Args:
        command: starts it.
        environment: of the program; None for this process's own.
        seconds: that it may take; None for any.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=None if environment is None else dict(environment),
        timeout=seconds,
        check=False,
    )


def last_line(errors: str) -> str:
    r"""The last line of what a program printed on stderr, for a message.

    >>> last_line("first\nlast\n"), last_line("")
    ('last', 'it says nothing')
    """
    return (errors.strip().splitlines() or ["it says nothing"])[-1][:300]
