"""Limits on a program's sizes and iterations, because a package may come from anyone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from device_harness.errors import DeviceError


@dataclass(frozen=True)
class Limits:
    """Limits that the interpreter checks before it does the work.

    Attributes:
        elements: the largest number of elements of one tensor.
        iterations: the largest number of iterations of one while_loop.
        depth: the largest depth of nested blocks.
    """

    elements: int = 1 << 29
    iterations: int = 100_000
    depth: int = 64


_CURRENT: ContextVar[Limits] = ContextVar("limits", default=Limits())  # noqa: B039 - it is frozen


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Applies these limits to the operations that run inside the ``with`` statement."""
    token = _CURRENT.set(limits)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def check_shape(shape: Iterable[int]) -> tuple[int, ...]:
    """Returns the shape of a tensor that is about to be made, after a check.

    Raises:
        DeviceError: a dimension is negative, or there are more elements than the limit allows.
    """
    dims = tuple(int(dim) for dim in shape)
    if any(dim < 0 for dim in dims):
        raise DeviceError(f"a tensor cannot have shape {list(dims)}: a dimension is negative")
    if math.prod(dims) > _CURRENT.get().elements:
        raise DeviceError(
            f"a tensor of shape {list(dims)} has more elements than the "
            f"{_CURRENT.get().elements} that are allowed here"
        )
    return dims


def most_iterations() -> int:
    """The largest number of iterations of one loop."""
    return _CURRENT.get().iterations
