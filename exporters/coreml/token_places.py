"""Where a call's tokens stand among themselves: numbers and masks that many recurrences share."""

from __future__ import annotations

from typing import Literal

from exporters.coreml.function import Shape, Value
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering

Relation = Literal["greater", "greater_equal", "equal"]


class TokenPlaces:
    """Emits, once each, numbers of the places 0, 1, ... of a call's tokens t and j.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens, and what it shares.
    """

    def __init__(self, state: FunctionLowering, positions: Positions) -> None:
        self.state, self.emitter, self.positions = state, state.emitter, positions

    def mask(self, relation: Relation, *, of_rows: bool = False) -> Value:
        """1 where t is in a relation to j, 0 elsewhere.

        ``fp32[t, j]``, or, to go with numbers of each row of a memory, ``fp32[t, j, 1]``.
        """
        emitter = self.emitter

        def make(name: str) -> Value:
            rows, columns = self._both(of_rows)
            holds = emitter.binary(relation, f"{name}_holds", rows, columns)
            return emitter.cast(name, holds, "fp32")

        return self.positions.share(f"tokens_{relation}{'_of_rows' * of_rows}", make)

    def blocks(self, size: int) -> Value:
        """1 where t and j are in one block of twice a size and in two of that size: ``fp32[t, j]``.

        The blocks are those of ``size`` tokens that follow each other from the first on.
        """
        emitter = self.emitter

        def same(name: str, size: int) -> Value:
            rows, columns = (
                emitter.binary("floor_div", f"{name}_{side}", places, size)
                for side, places in zip(("rows", "columns"), self._both(False), strict=True)
            )
            return emitter.binary("equal", name, rows, columns)

        def make(name: str) -> Value:
            outer, inner = same(f"{name}_outer", 2 * size), same(f"{name}_inner", size)
            apart = emitter.unary("logical_not", f"{name}_apart", inner)
            both = emitter.binary("logical_and", f"{name}_both", outer, apart)
            return emitter.cast(name, both, "fp32")

        return self.positions.share(f"token_blocks_{size}", make)

    def before(self, exclusive: bool) -> Value:
        """How many tokens of the call there are up to t: ``int32[t, 1]``; or, exclusive, before."""

        def make(name: str) -> Value:
            return self.emitter.binary("add", name, self._placed((self.state.tokens, 1)), 1)

        column = self._placed((self.state.tokens, 1))
        return column if exclusive else self.positions.share("tokens_up_to", make)

    def behind(self) -> Value:
        """How many tokens of the call are behind t: ``int32[t, 1]``."""

        def make(name: str) -> Value:
            up_to = self.before(False)
            return self.emitter.binary("sub", name, self.number(), up_to)

        return self.positions.share("tokens_behind", make)

    def between(self, exclusive: bool) -> Value:
        """How many tokens are behind j and up to t, or, exclusive, before t; at least 0.

        ``int32[t, j, 1]``.
        """
        emitter = self.emitter

        def make(name: str) -> Value:
            distance = emitter.binary("sub", f"{name}_distance", *self._both(True))
            if exclusive:
                distance = emitter.binary("sub", f"{name}_less", distance, 1)
            return emitter.binary("maximum", name, distance, 0)

        return self.positions.share(f"tokens_between{'_apart' * exclusive}", make)

    def number(self) -> Value:
        """How many tokens the call has: ``int32[1]``."""

        def make(name: str) -> Value:
            if self.state.tokens == -1:
                return self.emitter.reshape(name, self.positions.count(), (1,))
            return self.emitter.constant([self.state.tokens])

        return self.positions.share("tokens_number", make)

    def _both(self, of_rows: bool) -> tuple[Value, Value]:
        tokens = self.state.tokens
        if of_rows:
            return self._placed((tokens, 1, 1)), self._placed((1, tokens, 1))
        return self._placed((tokens, 1)), self._placed((1, tokens))

    def _placed(self, shape: Shape) -> Value:
        def steps(name: str) -> Value:
            count = self.state.tokens if self.state.tokens != -1 else self.positions.count()
            return self.emitter.numbers(name, count)

        return self.positions.share(
            f"token_steps_{'_'.join('1' if size == 1 else 't' for size in shape)}",
            lambda name: self.emitter.reshape(
                name, self.positions.share("token_steps", steps), shape
            ),
        )
