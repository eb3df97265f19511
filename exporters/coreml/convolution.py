"""The causal convolution over the last few tokens, with its state."""

from __future__ import annotations

from torch import fx

from exporters.coreml.carried import Carried
from exporters.coreml.function import Shape, Value
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering
from quant.program.calls import ShortConvCall
from quant.program.program import shape_of


class ShortConvolution:
    """Emits the short convolutions of one function.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens.
        carried: the states.
    """

    def __init__(self, state: FunctionLowering, positions: Positions, carried: Carried) -> None:
        self.state, self.emitter = state, state.emitter
        self.positions, self.carried = positions, carried

    def emit(self, node: fx.Node) -> Value:
        """Emits a convolution as a sum of shifted rows, and the update of its state.

        Given::

            %y = edgeforge::short_conv(%x, %weight, %recent, %position)

        Result: ``rows = [recent or zeros, x]`` along the tokens;
        ``y = weight[:, 0] * rows[: -2] + weight[:, 1] * rows[1 : -1] + weight[:, 2] * rows[2 :]``
        (for a width of 3); the state then holds the last two rows. What it held is selected away
        at position 0, so that not even a NaN of another text is read.
        """
        emitter, state, name = self.emitter, self.state, self.state.name(node)
        call, x = ShortConvCall.of(node), state.value(node, 0)
        columns, width = shape_of(call.weight)
        held = self.carried.held(node, 2)
        before = emitter.leading(f"{name}_before", self.carried.read(held), (1, width - 1, columns))
        follows = self.positions.share(
            "continues_each",
            lambda shared: emitter.reshape(shared, self.positions.continues(), (1, 1, 1)),
        )
        kept = emitter.select(f"{name}_kept", follows, before, 0.0)
        rows = emitter.concat(f"{name}_rows", [kept, x], 1)
        self._keep(held, name, rows, (1, width - 1, columns))
        made: Value | None = None
        for index, factors in enumerate(self._factors(name, node)):
            behind = width - 1 - index
            part = emitter.token_rows(f"{name}_rows_{index}", rows, index, x.shape[1], behind)
            term = emitter.binary("mul", f"{name}_term_{index}", part, factors)
            last = name if not behind else f"{name}_sum_{index}"
            made = term if made is None else emitter.binary("add", last, made, term)
        assert made is not None
        return made

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
