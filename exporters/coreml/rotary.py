"""The rotary embedding, read from tables; layers may have different ones."""

from __future__ import annotations

import numpy as np
from torch import fx

from exporters.coreml.function import Value
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering
from quant.program.program import node_argument, shape_of


class Rotary:
    """Emits the rotary embeddings of one function; those of one table share its rows.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens.
    """

    def __init__(self, state: FunctionLowering, positions: Positions) -> None:
        self.state, self.emitter, self.positions = state, state.emitter, positions

    def emit(self, node: fx.Node) -> Value:
        """Emits the rotary embedding, which rotates the first columns of each head.

        Given::

            %y = edgeforge::rope(%x, %cos, %sin, %position)

        Result: ``%y = x * [cos, cos] + [second, first] * [-sin, sin]`` over the rotated columns,
        where ``first`` and ``second`` are their halves, with the tables' rows for these positions.
        """
        emitter, name, x = self.emitter, self.state.name(node), self.state.value(node, 0)
        width = 2 * shape_of(node_argument(node, 1))[1]
        rest: list[Value] = []
        if width < x.shape[-1]:
            sizes = [width, x.shape[-1] - width]
            x, *rest = emitter.split([f"{name}_rotary", f"{name}_rest"], x, sizes)
        halves = emitter.split([f"{name}_first", f"{name}_second"], x, [width // 2] * 2)
        swapped = emitter.concat(f"{name}_swapped", halves[::-1], -1)
        straight = emitter.binary("mul", f"{name}_straight", x, self._rows(node, 1, None))
        crossed = emitter.binary("mul", f"{name}_crossed", swapped, self._rows(node, 2, -1.0))
        last = name if not rest else f"{name}_rotated"
        rotated = emitter.binary("add", last, straight, crossed)
        return emitter.concat(name, [rotated, *rest], -1) if rest else rotated

    def _rows(self, node: fx.Node, index: int, sign: float | None) -> Value:
        """A table's rows for these positions, twice: ``fp16[1, t, 1, width]``.

        Args:
            node: the rotary embedding.
            index: which of its arguments is the table.
            sign: the factor on the first copy; None for none.
        """
        emitter, state = self.emitter, self.state
        table = state.program.inputs[node_argument(node, index).name].name

        def make(name: str) -> Value:
            values = state.program.tables[table].numpy()
            if not state.style.wide:
                values = values.astype(np.float16)
            stored = state.bank.table(emitter, table, values)
            rows = emitter.gather_rows(f"{name}_rows", stored, self.positions.positions())
            half = emitter.cast(f"{name}_half", rows, "fp16")
            left = half if sign is None else emitter.binary("mul", f"{name}_negative", half, sign)
            both = emitter.concat(f"{name}_both", [left, half], -1)
            t, width = both.shape
            return emitter.reshape(name, both, (1, t, 1, width))

        return self.positions.share(table.removeprefix("rope_"), make)
