"""`Progress`: the callback by which long stages report how far they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and its size (0 when that is not known)."""


def no_progress(stage: str, done: int, size: int) -> None:
    """Ignores the report."""


NOTE: Final = "note: "
"""How a stage's name begins that is no stage but a sentence that the user must not miss."""


def tell(progress: Progress, sentence: str) -> None:
    """Reports a sentence that the user must not miss."""
    progress(f"{NOTE}{sentence}", 0, 0)
