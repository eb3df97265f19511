"""`Pair`: what an adapter adds to one weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    """``A: float32[in, rank]`` and ``B: float32[rank, out]``, which holds the scale."""
