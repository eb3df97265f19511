"""Limits on a program's sizes and iterations, because a package may come from anyone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from device_harness.errors import DeviceError


def _half_of_memory() -> int:
    """Half of this machine's memory, in bytes; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 8 << 30


@dataclass(frozen=True)
class Limits:
    """Limits that the interpreter checks before it does the work.

    Attributes:
        elements: the largest number of elements of one tensor.
        iterations: the largest number of iterations of all loops of one call together.
        depth: the largest depth of nested blocks.
        memory: the largest number of bytes of all states of a function, and of all values that a
            call holds at one time; by default half of this machine's memory.
        work: the largest number of elements of all tensors that one call makes.
    """

    elements: int = 1 << 29
    iterations: int = 100_000
    depth: int = 64
    memory: int = field(default_factory=_half_of_memory)
    work: int = 1 << 40


class Spent:
    """What a call has spent of its limits, and the memory of the values that it holds.

    Args:
        limits: the call's limits.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._iterations, self._work, self._held = 0, 0, 0
        self._users: dict[int, int] = {}  # by the address of a memory: the values that lie in it
        self._memories: dict[int, tuple[int, int]] = {}  # by slot: the address and the bytes

    def iteration(self) -> None:
        """Counts an iteration of a loop.

        Raises:
            DeviceError: the loops of this call have had all iterations that are allowed.
        """
        self._iterations += 1
        most = self._limits.iterations
        if self._iterations > most:
            raise DeviceError(
                f"the loop did not end within {most} iterations: raise Limits.iterations "
                f"(--max-iterations) if it is meant to run longer"
            )

    def made(self, slot: int, value: Tensor, is_view: bool) -> None:
        """Counts a tensor that an operation made, and that a slot holds from now on.

        Args:
            slot: the slot.
            value: the tensor.
            is_view: whether it may lie in the memory of another tensor; if not, small ones are not
                worth the time to count their memory.

        Raises:
            DeviceError: the call has made more elements, or holds more bytes, than are allowed.
        """
        elements, limits = value.numel(), self._limits
        self._work += elements
        if self._work > limits.work:
            raise DeviceError(
                f"the call makes more than {limits.work} elements, which are all that are allowed "
                f"here"
            )
        if slot in self._memories:  # an iteration's value takes the place of the last one's
            self.freed(slot)
        if elements < _FEW and not is_view:
            return
        memory = value.untyped_storage()
        place, nbytes, users = memory.data_ptr(), memory.nbytes(), self._users
        self._memories[slot] = place, nbytes
        if place in users:
            users[place] += 1
        else:
            users[place] = 1
            self._held += nbytes
        if self._held > limits.memory:
            raise DeviceError(
                f"the values of the call take {self._held} bytes at one time, more than the "
                f"{limits.memory} that are allowed here"
            )

    def freed(self, slot: int) -> None:
        """Counts that a slot holds its tensor no more."""
        place, nbytes = self._memories.pop(slot, (0, 0))
        users = self._users.pop(place, 0)
        if users > 1:
            self._users[place] = users - 1
        elif users:
            self._held -= nbytes


_SMALL: Final = 1 << 20
_FEW: Final = 512
_CURRENT: ContextVar[Limits] = ContextVar("limits")
_SPENT: ContextVar[Spent] = ContextVar("spent")


def _current() -> Limits:
    found = _CURRENT.get(None)
    return Limits() if found is None else found


@contextmanager
def limited(limits: Limits) -> Iterator[None]:
    """Applies these limits to the operations that run inside the ``with`` statement."""
    token, before = _CURRENT.set(limits), _SPENT.set(Spent(limits))
    try:
        yield
    finally:
        _CURRENT.reset(token)
        _SPENT.reset(before)


def check_shape(shape: Iterable[int]) -> tuple[int, ...]:
    """Returns the shape of a tensor that is about to be made, after a check.

    Raises:
        DeviceError: a dimension is negative, or there are more elements than the limit allows.
    """
    dims = tuple(int(dim) for dim in shape)
    if any(dim < 0 for dim in dims):
        raise DeviceError(f"a tensor cannot have shape {list(dims)}: a dimension is negative")
    most = _current().elements
    if math.prod(dims) > most:
        raise DeviceError(
            f"a tensor of shape {list(dims)} has more elements than the {most} that are allowed "
            f"here"
        )
    return dims


def check_broadcast(*tensors: Tensor) -> None:
    """Checks the shape to which tensors broadcast, before an operation makes it.

    Raises:
        DeviceError: it has more elements than the limit allows.
    """
    product = 1
    for tensor in tensors:
        product *= tensor.numel()
    if product > _SMALL:  # no broadcast has more elements than the product of all
        rank = max(tensor.dim() for tensor in tensors)
        shapes = [(1,) * (rank - tensor.dim()) + tuple(tensor.shape) for tensor in tensors]
        check_shape(max(dims) for dims in zip(*shapes, strict=True))


def check_states(shapes: Iterable[tuple[int, ...]], itemsizes: Iterable[int]) -> None:
    """Checks all states of a function together.

    Raises:
        DeviceError: one has too many elements, or all together take more memory than allowed.
    """
    nbytes = sum(
        math.prod(check_shape(shape)) * size for shape, size in zip(shapes, itemsizes, strict=True)
    )
    most = _current().memory
    if nbytes > most:
        raise DeviceError(
            f"the states take {nbytes} bytes together, more than the {most} that are allowed here"
        )


def spent() -> Spent:
    """What the call that runs now has spent of its limits."""
    return _SPENT.get()
