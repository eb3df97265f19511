"""The one scale of a matrix's inputs, for targets that must know it before they run.

A few numbers that calibration sees far out would widen the steps of all others. So the scale is the
one of least squared error over all that it saw, of those that reach from `FURTHEST_CLIP` of the
largest number to the whole of it. Numbers are counted by their size, and each bin stands for its
middle.
"""

from __future__ import annotations

from typing import Final

import torch

BINS: Final = 4096
FURTHEST_CLIP: Final = 0.2
_CLIPS: Final = 81
# float16 holds every bfloat16 from here on, and one number serves all targets.
_SMALLEST_SCALE: Final = 2.0**-14


def input_scale(counts: torch.Tensor, largest: float) -> torch.Tensor:
    """The scale of least squared error.

    Args:
        counts: float64 ``[BINS]``: how many numbers lie in each of so many equal parts of the way
            from 0 to the largest, by their absolute values.
        largest: the largest absolute value.

    Returns:
        ``bfloat16[1, 1]``, 2**-14 at least, so that float16 holds it exactly.

    >>> input_scale(torch.ones(BINS, dtype=torch.float64), 127.0)
    tensor([[1.]], dtype=torch.bfloat16)
    """
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (largest / BINS)
    scales = torch.linspace(FURTHEST_CLIP, 1, _CLIPS, dtype=torch.float64) * (largest / 127)
    stored = scales.clamp_min(_SMALLEST_SCALE).to(torch.bfloat16)
    costs = torch.stack([_error(counts, middle, step) for step in stored.double()])
    # Of equals the one that clips least.
    best = len(costs) - 1 - int(costs.flip(0).argmin())
    return stored[best].reshape(1, 1)


def _error(counts: torch.Tensor, middle: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What a scale costs: clipping exactly, rounding as evenly spread numbers have it."""
    rounding = torch.minimum(middle.square(), step.square() / 12)
    clipping = (middle - 127 * step).square()
    return (counts * torch.where(middle > 127.5 * step, clipping, rounding)).sum()
