"""`Progress`: how long stages tell what is done of them."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it, and its size (0 when that is not known)."""


def no_progress(stage: str, done: int, size: int) -> None:
    """Tells nobody."""
