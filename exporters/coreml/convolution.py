"""The causal convolution over the last few tokens, with its state."""

from __future__ import annotations

from torch import fx

from exporters.coreml.function import Value
from exporters.coreml.recent import RecentRows
from exporters.coreml.state import FunctionLowering
from quant.program.calls import ShortConvCall
from quant.program.program import shape_of


class ShortConvolution:
    """Emits the short convolutions of one function.

    Args:
        state: the function being lowered.
        recent: the rows of recent tokens.
    """

    def __init__(self, state: FunctionLowering, recent: RecentRows) -> None:
        self.state, self.emitter, self.recent = state, state.emitter, recent

    def emit(self, node: fx.Node) -> Value:
        """Emits a convolution as a sum of shifted rows, and the update of its state.

        Given::

            %y = edgeforge::short_conv(%x, %weight, %recent, %position)

        Result: ``rows = [recent or zeros, x]`` along the tokens;
        ``y = weight[:, 0] * rows[: -2] + weight[:, 1] * rows[1 : -1] + weight[:, 2] * rows[2 :]``
        (for a width of 3); the state then holds the last two rows.
        """
        emitter, state, name = self.emitter, self.state, self.state.name(node)
        x, width = state.value(node, 0), shape_of(ShortConvCall.of(node).weight)[1]
        rows = self.recent.joined(node, 2, x, width - 1)
        made: Value | None = None
        for index, factors in enumerate(self._factors(name, node)):
            behind = width - 1 - index
            part = emitter.token_rows(f"{name}_rows_{index}", rows, index, x.shape[1], behind)
            term = emitter.binary("mul", f"{name}_term_{index}", part, factors)
            last = name if not behind else f"{name}_sum_{index}"
            made = term if made is None else emitter.binary("add", last, made, term)
        assert made is not None
        return made

    def _factors(self, name: str, node: fx.Node) -> list[Value]:
        """The weight's columns, each as ``fp16[1, n]``."""
        emitter = self.emitter
        stored = self.state.floating(node)
        columns, width = stored.shape
        half = emitter.cast_once(f"{stored.name}_half", stored, "fp16")
        turned = emitter.call(
            "transpose", f"{name}_turned", "fp16", (width, columns), x=half, perm=[1, 0]
        )
        names = [f"{name}_factors_{index}" for index in range(width)]
        return emitter.split(names, turned, [1] * width, axis=0)
