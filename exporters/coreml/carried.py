"""What a function carries from call to call: states, or inputs that come back as outputs."""

from __future__ import annotations

from typing import Final

from torch import fx

from exporters.coreml.function import Shape, Value
from exporters.coreml.names import UPDATED, state_names
from exporters.coreml.state import FunctionLowering
from quant.program.program import Input, node_argument, shape_of

# The Neural Engine takes states whose last two dimensions are multiples of this.
ANE_MULTIPLE: Final = 32


def padded(size: int) -> int:
    """Rounds a size up to a multiple of `ANE_MULTIPLE`.

    >>> [padded(n) for n in (32, 33)]
    [32, 64]
    """
    return -(-size // ANE_MULTIPLE) * ANE_MULTIPLE


class Carried:
    """Declares and emits what a function carries, in the order of the program's inputs.

    Args:
        state: the function being lowered.
    """

    def __init__(self, state: FunctionLowering) -> None:
        self.state, self.emitter = state, state.emitter
        self._held: dict[str, tuple[Value, ...]] = {}
        self._updated: list[Value] = []
        for node in state.program.graph.nodes:
            given = state.program.inputs.get(node.name) if node.op == "placeholder" else None
            if given is not None and given.kind in ("cache", "recent", "memory"):
                self._held[node.name] = self._declare(node, given)

    def _declare(self, node: fx.Node, given: Input) -> tuple[Value, ...]:
        emitter, shape = self.emitter, self._shape(node, given)
        if self.state.style.states:
            return tuple(emitter.state(name, shape) for name in state_names(given.name))
        return tuple(emitter.input(name, "fp16", shape) for name in state_names(given.name))

    def _shape(self, node: fx.Node, given: Input) -> Shape:
        style = self.state.style
        if given.kind == "cache":
            _, heads, _, width = shape_of(node)
            return 1, heads, style.context, width if style.wide else padded(width)
        if given.kind == "memory":
            _, heads, rows, columns = shape_of(node)
            sizes = (rows, columns)
            return (1, heads, *(sizes if style.wide else map(padded, sizes)))
        _, columns, tokens = shape_of(node)
        sizes = (tokens, columns)  # a row for each token, as activations have it
        return (1, *(sizes if style.wide else map(padded, sizes)))

    def outputs(self) -> None:
        """Declares what was written as outputs, where nothing is a state."""
        for value in self._updated:
            self.emitter.output(value)

    def held(self, node: fx.Node, index: int) -> Value:
        """The state, or the input, that is a node's argument."""
        (held,) = self.halves(node, index)
        return held

    def halves(self, node: fx.Node, index: int) -> tuple[Value, ...]:
        """The states, or the inputs, that are a node's argument: for a memory, high and low."""
        return self._held[node_argument(node, index).name]

    def read(self, held: Value) -> Value:
        """What a state holds before the call."""
        if not self.state.style.states:
            return held
        return self.emitter.call("read_state", f"{held.name}_old", "fp16", held.shape, input=held)

    def written_name(self, held: Value) -> str:
        """The name for the value that is going to be written."""
        return f"{held.name}_new" if self.state.style.states else held.name + UPDATED

    def now(self, held: Value, updated: Value) -> Value:
        """What a state holds after the call wrote it: of a state, what was read from it again."""
        if not self.state.style.states:
            return updated
        return self.emitter.call("read_state", f"{held.name}_now", "fp16", held.shape, input=held)

    def write(self, held: Value, updated: Value) -> None:
        """Makes a state hold a value after the call."""
        if self.state.style.states:
            self.emitter.call_many("write_state", [], input=held, data=updated)
        else:
            self._updated.append(updated)
