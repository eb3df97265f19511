"""`Pair`: what an adapter adds to one weight; and the refusal of a weight that takes none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from exporters.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    """``A: float32[in, rank]`` and ``B: float32[rank, out]``, which holds the scale."""


def no_product(where: str, weight: str) -> ExportError:
    """The error of a file that has no product with a weight which an adapter changes."""
    return ExportError(
        f"{where} has no product with {weight} that an adapter could be added to: leave "
        f"--adapter-mode out, and the adapter is merged into the weights"
    )
