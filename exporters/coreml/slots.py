"""Emits the slots of a mixture of attention heads: where a token's experts stand side by side.

What a token's experts compute is ``[t, heads, slots, width of a head]``, tokens outermost, so that
views alone lead from there to ``[1, t, heads * slots * width]`` and back. Placing an expert's
result and finding it again are both a ``select`` by one mask of each expert, which also keeps out
what the expert computed for tokens that did not choose it, be it infinite or NaN.
"""

from __future__ import annotations

import numpy as np

from exporters.coreml.function import Value
from exporters.coreml.state import FunctionLowering


class Slots:
    """The slots of a group of branches of one mixture.

    Args:
        state: the state of lowering the function.
        weights: each token's weight of each expert, ``[1, t, E]``.
        chosen: where it is not zero.
        number: how many slots a token has.
        heads: how many heads a slot has.
    """

    def __init__(
        self, state: FunctionLowering, weights: Value, chosen: Value, number: int, heads: int
    ) -> None:
        self._state, self._emitter = state, state.emitter
        self._tokens, self._number, self._heads = weights.shape[1], number, heads
        dtype = weights.dtype
        values = np.arange(1, number + 1, dtype=np.float16 if dtype == "fp16" else np.float32)
        name = f"slots_{dtype}_{number}"
        self._numbers = state.bank.table(self._emitter, name, values.reshape(1, 1, number, 1))
        self._places = self._emitter.once(("places", weights.name), lambda: self._placed(chosen))

    def _placed(self, chosen: Value) -> Value:
        """The slot that each expert has, counted from 1; 0 where a token did not choose it.

        Given::

            %s = edgeforge::slots(%weights, ...)

        Result, ``[t, 1, 1, E]``::

            chosen = weights != 0
            places = select(chosen, cumsum(chosen), 0)
        """
        emitter, name, dtype = self._emitter, chosen.name, self._numbers.dtype
        ones = emitter.cast_once(f"{name}_numbers", chosen, dtype)
        counted = emitter.running_sum(f"{name}_counted", ones)
        places = emitter.select(f"{name}_places", chosen, counted, 0.0)
        return emitter.reshape(
            f"{name}_places_apart", places, (self._tokens, 1, 1, chosen.shape[-1])
        )

    def empty(self, name: str, width: int, dtype: str) -> Value:
        """Slots that no expert has filled: ``[t, heads, slots, width]`` zeros."""
        emitter, heads, number = self._emitter, self._heads, self._number
        place = emitter.column(f"{name}_of_one", self._places, 0)
        zero = emitter.zeros(f"{name}_zero", place, dtype)
        return emitter.tile(name, zero, (1, heads, number, width))

    def filled(self, at: str, expert: int, result: Value, slots: Value) -> Value:
        """Slots with an expert's result in its own one of each token that chose it.

        Args:
            at: what names begin with.
            expert: the expert's index.
            result: what it computed for all tokens, ``[1, t, heads * width]``.
            slots: the slots so far, ``[t, heads, slots, width]``.
        """
        emitter, width = self._emitter, slots.shape[-1]
        apart = emitter.reshape(f"{at}_heads", result, (self._tokens, self._heads, 1, width))
        return emitter.select(f"{at}_slots", self._own(at, expert), apart, slots)

    def joined(self, name: str, slots: Value) -> Value:
        """All slots side by side, head by head: ``[1, t, heads * slots * width]``."""
        columns = self._heads * self._number * slots.shape[-1]
        return self._emitter.reshape(name, slots, (1, self._tokens, columns))

    def apart(self, name: str, joined: Value) -> Value:
        """Undoes `joined`."""
        width = joined.shape[-1] // (self._heads * self._number)
        shape = (self._tokens, self._heads, self._number, width)
        return self._emitter.reshape(name, joined, shape)

    def read(self, at: str, expert: int, slots: Value) -> Value:
        """An expert's own slot of each token: ``[1, t, heads * width]``.

        It is zero for tokens that did not choose the expert. A sum over slots of which at most one
        is not zero is exact.

        Args:
            at: what names begin with.
            expert: the expert's index.
            slots: ``[t, heads, slots, width]``.
        """
        emitter = self._emitter
        own = emitter.select(f"{at}_own", self._own(at, expert), slots, 0.0)
        summed = emitter.sum_over(f"{at}_slot", own, 2)
        columns = self._heads * slots.shape[-1]
        return emitter.reshape(f"{at}_own_tokens", summed, (1, self._tokens, columns))

    def _own(self, at: str, expert: int) -> Value:
        """Which slot of each token is an expert's: ``bool[t, 1, slots, 1]``."""
        place = self._emitter.column(f"{at}_place", self._places, expert)
        return self._emitter.binary("equal", f"{at}_is_own", place, self._numbers)
