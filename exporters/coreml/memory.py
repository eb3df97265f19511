"""A recurrence's memory, which is float32, in two float16 states that add up to it.

Core ML's states hold float16 only. A recurrence adds to its memory at every token, and what is
small beside the sum would be lost in 11 bits: over thousands of tokens a memory that decays slowly
would drift. So there are two states::

    memory = UNIT * (high + low / FINER)
    high = float16(memory / UNIT),  low = float16((memory / UNIT - high) * FINER)

Together they hold 22 bits. ``low`` is stretched by `FINER`, so that it is about as large as
``high``: stored as it is, it would be a subnormal number, which has fewer bits, wherever the memory
is below 4. ``UNIT`` moves the largest number that they hold from 65,504 to 1,048,064; what exceeds
that becomes infinite in ``high`` and NaN at the next call, and is never a wrong number.
"""

from __future__ import annotations

from typing import Final

from torch import fx

from exporters.coreml.carried import Carried
from exporters.coreml.function import Shape, Value
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering

UNIT: Final = 16.0
FINER: Final = 2048.0
"""What float16 rounds away of a number is at most the number divided by this."""


class Memory:
    """Emits the memories of one function.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens.
        carried: the states.
    """

    def __init__(self, state: FunctionLowering, positions: Positions, carried: Carried) -> None:
        self.state, self.emitter = state, state.emitter
        self.positions, self.carried = positions, carried

    def read(self, node: fx.Node, index: int, shape: Shape) -> Value:
        """A memory before the call, ``fp32[1, h, n, p]``; zeros at position 0, even for a NaN.

        Args:
            node: the operator that has the memory.
            index: which of its arguments the memory is.
            shape: the memory's shape, without a state's padding.
        """
        emitter, name = self.emitter, self.state.name(node)
        high, low = (
            self._wide(f"{name}_{part}", self.carried.read(held), shape)
            for part, held in zip(("high", "low"), self.carried.halves(node, index), strict=True)
        )
        rest = emitter.binary("mul", f"{name}_rest", low, 1 / FINER)
        whole = emitter.binary("add", f"{name}_whole", high, rest)
        memory = emitter.binary("mul", f"{name}_memory", whole, UNIT)
        follows = self.positions.share(
            "continues_memory",
            lambda shared: emitter.reshape(shared, self.positions.continues(), (1, 1, 1, 1)),
        )
        return emitter.select(f"{name}_kept", follows, memory, 0.0)

    def write(self, node: fx.Node, index: int, memory: Value) -> None:
        """Makes the two states hold a memory after the call, ``fp32[1, h, n, p]``.

        ``high`` is read from its state again before it is subtracted: what a state holds is
        float16 whatever a compiler makes of two casts behind each other.
        """
        emitter, name = self.emitter, self.state.name(node)
        high, low = self.carried.halves(node, index)
        whole = emitter.binary("mul", f"{name}_units", memory, 1 / UNIT)
        held = self.carried.now(high, self._keep(high, f"{name}_high_left", whole))
        back = self._wide(f"{name}_high_now", held, memory.shape)
        rest = emitter.binary("sub", f"{name}_rest_now", whole, back)
        finer = emitter.binary("mul", f"{name}_finer", rest, FINER)
        self._keep(low, f"{name}_low_left", finer)

    def _wide(self, name: str, held: Value, shape: Shape) -> Value:
        cut = self.emitter.leading(f"{name}_half", held, shape)
        return self.emitter.cast(name, cut, "fp32")

    def _keep(self, held: Value, cut: str, value: Value) -> Value:
        written = self.carried.written_name(held)
        half = self.emitter.cast(written if value.shape == held.shape else cut, value, "fp16")
        updated = self.emitter.pad_to(written, half, held.shape)
        self.carried.write(held, updated)
        return updated
