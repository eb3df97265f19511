"""How the divergence goes along a block: a bug that begins at a position shows as a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKETS = 32


@dataclass(frozen=True)
class PositionCurve:
    """Mean divergences of neighbouring positions, each ``float64[buckets]``.

    Attributes:
        first: the first position of each bucket, counted from the beginning of a block.
        counts: how many positions of all blocks it holds.
        lowering: mean KL of ARTIFACT from QUANTIZED, nats a token.
        total: mean KL of ARTIFACT from FLOAT.
    """

    first: tuple[int, ...]
    counts: tuple[int, ...]
    lowering: tuple[float, ...]
    total: tuple[float, ...]


class CurveMeter:
    """Adds divergences up by position.

    Args:
        length: tokens of the longest block.
    """

    def __init__(self, length: int) -> None:
        self._width = max(1, -(-length // BUCKETS))
        buckets = -(-length // self._width)
        self._counts = torch.zeros(buckets, dtype=torch.float64)
        self._sums = {name: torch.zeros_like(self._counts) for name in ("lowering", "total")}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds a block's divergences ``float32[t]`` of ``lowering`` and ``total``."""
        tokens = len(values["total"])
        places = torch.arange(tokens) // self._width
        self._counts.index_add_(0, places, torch.ones(tokens, dtype=torch.float64))
        for name, sums in self._sums.items():
            sums.index_add_(0, places, values[name].double())

    def result(self) -> PositionCurve:
        """The curve so far."""
        means = {name: (sums / self._counts).tolist() for name, sums in self._sums.items()}
        return PositionCurve(
            first=tuple(range(0, len(self._counts) * self._width, self._width)),
            counts=tuple(int(count) for count in self._counts),
            lowering=tuple(means["lowering"]),
            total=tuple(means["total"]),
        )
