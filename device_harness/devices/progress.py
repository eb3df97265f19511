"""How set-up and sending files report how far they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and its size (0 when that is not known)."""


def no_progress(stage: str, done: int, size: int) -> None:
    """Ignores the report."""
