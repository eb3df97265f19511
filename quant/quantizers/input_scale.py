"""Chooses the one scale of a matrix's inputs, for targets that must know it before they run.

A scale that covers the few largest inputs of calibration would widen the steps of all others. So
the search tries scales whose largest code stands for `FURTHEST_CLIP` times the largest input up to
the largest input itself, and takes the one of least squared error over all inputs that calibration
saw. It works on a histogram of the inputs' absolute values, where each bin stands for its middle.
"""

from __future__ import annotations

from typing import Final

import torch

BINS: Final = 4096
FURTHEST_CLIP: Final = 0.2
_CLIPS: Final = 81
# The smallest scale that every target can store: bfloat16 values from here on are exact in float16.
_SMALLEST_SCALE: Final = 2.0**-14


def input_scale(counts: torch.Tensor, largest: float) -> torch.Tensor:
    """Returns the scale of least squared error.

    Args:
        counts: float64 ``[BINS]``: a histogram of the inputs' absolute values over `BINS` equal
            intervals from 0 to ``largest``.
        largest: the largest absolute value.

    Returns:
        ``bfloat16[1, 1]``, at least 2**-14, so that float16 holds it exactly.

    >>> input_scale(torch.ones(BINS, dtype=torch.float64), 127.0)
    tensor([[1.]], dtype=torch.bfloat16)
    """
    middle = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (largest / BINS)
    scales = torch.linspace(FURTHEST_CLIP, 1, _CLIPS, dtype=torch.float64) * (largest / 127)
    stored = scales.clamp_min(_SMALLEST_SCALE).to(torch.bfloat16)
    costs = torch.stack([_error(counts, middle, step) for step in stored.double()])
    # Of scales with equal errors, take the one that clips least.
    best = len(costs) - 1 - int(costs.flip(0).argmin())
    return stored[best].reshape(1, 1)


def _error(counts: torch.Tensor, middle: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Returns a scale's squared error: clipping exactly, rounding as for uniform inputs."""
    rounding = torch.minimum(middle.square(), step.square() / 12)
    clipping = (middle - 127 * step).square()
    return (counts * torch.where(middle > 127.5 * step, clipping, rounding)).sum()
