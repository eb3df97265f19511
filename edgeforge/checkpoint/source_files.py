"""Notices files that change between the moment they are first looked at and the end of the work.

A digest says what a file held when it was hashed, and weights are read at other moments. Both are
of the same bytes only if the file stayed as it was all the while.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from edgeforge.errors import CheckpointError, EdgeForgeError

# File systems note times of changes in steps of a few milliseconds. Two changes within a step leave
# the same time, so a file that has just changed is looked at again once the step is over.
_STEP_SECONDS: Final = 0.02

_State = tuple[int, int, int, int] | None


class SourceFiles:
    """Files that must not change: size, times of modification and change, and inode of each.

    Args:
        error: the error that `require_unchanged` raises.
    """

    def __init__(self, error: type[EdgeForgeError] = CheckpointError) -> None:
        self._error = error
        self._states: dict[Path, _State] = {}
        self._lock = threading.Lock()

    def watch(self, paths: Iterable[Path]) -> None:
        """Notes the state of files, before any of them is read; one may be absent and stay so."""
        with self._lock:
            new = [path for path in paths if path not in self._states]
            states = {path: _state(path) for path in new}
            now = time.time_ns()
            ages = [now - max(state[1:3]) for state in states.values() if state is not None]
            if any(0 <= age < _STEP_SECONDS * 1e9 for age in ages):
                time.sleep(_STEP_SECONDS)
                states = {path: _state(path) for path in new}
            self._states.update(states)

    def require_unchanged(self) -> None:
        """Refuses files that are not as they were.

        Raises:
            EdgeForgeError: of the class that was given; names the file.
        """
        with self._lock:
            states = list(self._states.items())
        for path, before in states:
            now = _state(path)
            if now == before:
                continue
            what = "was removed" if now is None else "appeared" if before is None else "changed"
            raise self._error(
                f"{path} {what} while it was read, so nothing was made of it: wait until the "
                f"program that writes it is done, then run the command again"
            )


def _state(path: Path) -> _State:
    """Size in bytes, times in nanoseconds, inode; None where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
