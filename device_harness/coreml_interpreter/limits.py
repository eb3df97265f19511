"""How large and how long a program may get: packages are read from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from device_harness.errors import DeviceError


@dataclass(frozen=True)
class Limits:
    """What is refused before it is tried.

    Attributes:
        elements: of one tensor, at most.
        iterations: of one while_loop, at most.
        depth: of blocks within blocks, at most.
    """

    elements: int = 1 << 29
    iterations: int = 100_000
    depth: int = 64


_CURRENT: ContextVar[Limits] = ContextVar("limits", default=Limits())  # noqa: B039 - it is frozen


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Holds the operations run within to these limits."""
    token = _CURRENT.set(limits)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def check_shape(shape: Iterable[int]) -> tuple[int, ...]:
    """The shape of a tensor about to be made.

    Raises:
        DeviceError: a negative dimension, or more elements than are allowed.
    """
    dims = tuple(int(dim) for dim in shape)
    if any(dim < 0 for dim in dims):
        raise DeviceError(f"a tensor of shape {list(dims)} cannot be: a dimension is negative")
    if math.prod(dims) > _CURRENT.get().elements:
        raise DeviceError(
            f"a tensor of shape {list(dims)} has more elements than the "
            f"{_CURRENT.get().elements} that are allowed here"
        )
    return dims


def most_iterations() -> int:
    """Of one loop."""
    return _CURRENT.get().iterations
