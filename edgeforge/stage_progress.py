"""How long stages tell what is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it, and its size (0 when that is not known)."""
