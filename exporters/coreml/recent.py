"""The state that holds a text's last few rows: read, joined to a call's own rows, and replaced."""

from __future__ import annotations

from torch import fx

from exporters.coreml.carried import Carried
from exporters.coreml.function import Shape, Value
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering


class RecentRows:
    """Emits the rows of recent tokens for one function.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens.
        carried: the states.
    """

    def __init__(self, state: FunctionLowering, positions: Positions, carried: Carried) -> None:
        self.state, self.emitter = state, state.emitter
        self.positions, self.carried = positions, carried

    def joined(self, node: fx.Node, index: int, x: Value, count: int) -> Value:
        """The rows before a call and its own, ``fp16[1, count + t, n]``; updates the state.

        What the state held is selected away at position 0, so that not even a NaN of another text
        is read.

        Args:
            node: the operator that has the state.
            index: which of its arguments the state is.
            x: the call's rows, ``fp16[1, t, n]``.
            count: how many rows the state holds.
        """
        emitter, name = self.emitter, self.state.name(node)
        shape = (1, count, x.shape[2])
        held = self.carried.held(node, index)
        before = emitter.leading(f"{name}_before", self.carried.read(held), shape)
        follows = self.positions.share(
            "continues_each",
            lambda shared: emitter.reshape(shared, self.positions.continues(), (1, 1, 1)),
        )
        kept = emitter.select(f"{name}_kept", follows, before, 0.0)
        rows = emitter.concat(f"{name}_rows", [kept, x], 1)
        self._keep(held, name, rows, shape)
        return rows

    def _keep(self, held: Value, name: str, rows: Value, shape: Shape) -> None:
        """Writes the last rows, as many as a shape says, to a state, which may be padded."""
        emitter, written = self.emitter, self.carried.written_name(held)
        cut = written if shape == held.shape else f"{name}_left"
        if self.state.tokens == -1:
            # Of a number of rows that is not known, coremltools does not know how many are left.
            left = emitter.token_rows(f"{name}_left_open", rows, -shape[1], -1, 0)
            left = emitter.reshape(cut, left, shape)
        else:
            left = emitter.token_rows(cut, rows, -shape[1], shape[1], 0)
        self.carried.write(held, emitter.pad_to(written, left, held.shape))
