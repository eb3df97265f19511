"""Shapes, numbers and choices for the arguments of an operation, and how a row is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

MIL = "mil"


Arguments = dict[str, Any]


class Draw:
    """Shapes, numbers and choices, drawn by hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._rng = np.random.default_rng(self.int(0, 10_000))

    def int(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def pick(self, *choices: Any) -> Any:
        return self._data.draw(st.sampled_from(choices))

    def flag(self) -> bool:
        return self.pick(False, True)

    def shape(self, low: int = 1, high: int = 4, largest: int = 4) -> tuple[int, ...]:
        return tuple(self.int(1, largest) for _ in range(self.int(low, high)))

    def axis(self, rank: int) -> int:
        return self.int(-rank, rank - 1)

    def axes(self, rank: int) -> list[int]:
        chosen = [axis for axis in range(rank) if self.flag()] or [0]
        return [axis - rank if self.flag() else axis for axis in chosen]

    def floats(
        self, shape: tuple[int, ...], low: float = -3, high: float = 3
    ) -> np.ndarray[Any, Any]:
        return self._rng.uniform(low, high, shape).astype(np.float32)

    def ints(self, shape: tuple[int, ...], low: int = -5, high: int = 6) -> np.ndarray[Any, Any]:
        return self._rng.integers(low, high, shape).astype(np.int32)

    def bools(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._rng.integers(0, 2, shape).astype(bool)

    def codes(self, bits: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._rng.integers(0, 1 << bits, shape).astype(np.uint8)

    def broadcast(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Two shapes that broadcast, of the same rank or not."""
        full = self.shape()
        one = tuple(1 if self.flag() else dim for dim in full)
        other = tuple(1 if self.flag() else dim for dim in full)[self.int(0, len(full) - 1) :]
        return (one, other) if self.flag() else (other, one)


@dataclass(frozen=True)
class Row:
    """How an operation is checked.

    Attributes:
        make: draws arguments.
        oracle: `MIL`, or what computes the result from the same arguments.
        opset: generation of coremltools' operation.
        tolerance: of floats, relative and absolute.
    """

    make: Callable[[Draw], Arguments]
    oracle: Any = MIL
    opset: str = "iOS17"
    tolerance: float = 2e-6
