"""Walks a program and emits one function of a package: a handler for each operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from torch import fx

from exporters.coreml.attention import Attention
from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Shape, Value
from exporters.coreml.names import LOGITS, POSITION, TOKENS
from exporters.coreml.norms import scaled_rms_norm, wide_rms_norm
from exporters.coreml.weights import Weight, WeightBank
from exporters.errors import ExportError
from quant import dialect
from quant.formats import PaletteFormat
from quant.ops import quantized_format
from quant.program import Program, node_argument, shape_of

Profile = Literal["gpu", "ane"]
Opset = Literal["ios17", "ios18"]
OPSETS: Final[dict[Opset, tuple[str, int]]] = {"ios17": ("CoreML7", 8), "ios18": ("CoreML8", 9)}
"""MIL's name of a generation of operators, and the version of the specification."""


@dataclass(frozen=True)
class Style:
    """How functions are written.

    Attributes:
        profile: the processor they are shaped for.
        opset: the generation of operators.
        one_hot: whether caches are written by a product with one-hot rows.
        context: length of the caches, tokens.
    """

    profile: Profile
    opset: Opset
    one_hot: bool
    context: int

    @property
    def states(self) -> bool:
        """Whether caches are states; else they are inputs and outputs."""
        return self.opset == "ios18"

    @property
    def wide(self) -> bool:
        """Whether float32 operations are used where float16 would lose."""
        return self.profile == "gpu"


class FunctionLowering:
    """Lowers a program to a function for a number of tokens.

    Args:
        program: in the lowered dialect.
        bank: the weights it names.
        name: the function's.
        tokens: of a call; -1 when the caller chooses among several.
        style: how it is written.
    """

    def __init__(
        self, program: Program, bank: WeightBank, name: str, tokens: int, style: Style
    ) -> None:
        self.program, self.bank, self.style, self.tokens = program, bank, style, tokens
        self.emitter = Emitter(name, OPSETS[style.opset][0])
        self._values: dict[fx.Node, Value] = {}

    def run(self) -> Emitter:
        """Emits the whole function.

        Raises:
            ExportError: a node that has no handler.
        """
        emitter = self.emitter
        self._ids = emitter.input(TOKENS, "int32", (1, self.tokens))
        position = emitter.input(POSITION, "int32", (1,))
        self.attention = Attention(self, position)
        for node in self.program.graph.nodes:
            if node.op != "call_function" or node.target in (dialect.GET, dialect.SIZE):
                continue  # a split names what is taken from it; sizes only feed views
            handler = HANDLERS.get(node.target)
            if handler is None:
                raise ExportError(
                    f"the Core ML target has no handler for {node.target} at {node.name}"
                )
            self._values[node] = handler(self, node)
        emitter.output(self._values[self.program.output()])
        self.attention.outputs()
        return emitter

    @property
    def ids(self) -> Value:
        """The tokens: ``int32[1, t]``."""
        return self._ids

    def value(self, node: fx.Node, index: int) -> Value:
        """The value of one of a node's arguments."""
        return self._values[node_argument(node, index)]

    def name(self, node: fx.Node) -> str:
        """What a node's result is called."""
        return LOGITS if node is self.program.output() else f"op_{node.name}"

    def dims(self, node: fx.Node) -> Shape:
        """A node's shape for this function's number of tokens."""
        return tuple(self.tokens if dim == -1 else dim for dim in shape_of(node))

    def weight_name(self, node: fx.Node, index: int = 1) -> str:
        """The weight that an argument is, or is a part of."""
        return self.program.inputs[node_argument(node, index).name].name

    def floating(self, node: fx.Node) -> Value:
        """The float weight that is a node's second argument."""
        shape = shape_of(node_argument(node, 1))
        return self.bank.floating(self.emitter, self.weight_name(node), shape)

    def quantized(self, node: fx.Node) -> Weight:
        """The quantized weight that a node reads."""
        format, weight = quantized_format(str(node.args[4])), self.weight_name(node)
        rows, stored = shape_of(node_argument(node, 1))
        shape = rows, stored * 8 // format.bits
        if isinstance(format, PaletteFormat):
            return Weight(self.bank.palette(self.emitter, weight, format, shape))
        return self.bank.integer(self.emitter, weight, format, shape)

    def split_results(self, node: fx.Node, pieces: list[Value]) -> None:
        """Names what is taken from a split."""
        for user in node.users:
            index = user.args[1]
            assert isinstance(index, int)
            self._values[user] = pieces[index]


def _product(state: FunctionLowering, node: fx.Node, weight: Weight) -> Value:
    """``x @ weight.T`` in the weight's dtype, given as float16."""
    emitter, name = state.emitter, state.name(node)
    dtype = weight.value.dtype
    zeros = np.zeros(weight.value.shape[0], np.float32 if dtype == "fp32" else np.float16)
    bias = state.bank.table(emitter, f"no_bias_{dtype}_{len(zeros)}", zeros)
    x = emitter.cast(f"{name}_wide_input", state.value(node, 0), dtype)
    raw = name if weight.descale is None and dtype == "fp16" else f"{name}_raw"
    product = emitter.linear(raw, x, weight.value, bias)
    if weight.descale is not None:
        product = emitter.binary("mul", name, product, weight.descale)
    return emitter.cast(name, product, "fp16")


def _rows(state: FunctionLowering, node: fx.Node, weight: Weight) -> Value:
    """Rows of a table for the tokens, as float16."""
    emitter, name = state.emitter, state.name(node)
    raw = name if weight.descale is None and weight.value.dtype == "fp16" else f"{name}_raw"
    rows = emitter.gather_rows(raw, weight.value, state.ids)
    if weight.descale is not None:
        factors = emitter.gather_rows(f"{name}_factors", weight.descale, state.ids)
        column = emitter.reshape(f"{name}_factor_column", factors, (*factors.shape, 1))
        rows = emitter.binary("mul", name, rows, column)
    return emitter.cast(name, rows, "fp16")


def _embedding(state: FunctionLowering, node: fx.Node) -> Value:
    return _rows(state, node, Weight(state.floating(node)))


def _quant_embedding(state: FunctionLowering, node: fx.Node) -> Value:
    return _rows(state, node, state.quantized(node))


def _linear(state: FunctionLowering, node: fx.Node) -> Value:
    return _product(state, node, Weight(state.floating(node)))


def _quant_linear(state: FunctionLowering, node: fx.Node) -> Value:
    return _product(state, node, state.quantized(node))


def _round_per_tensor(state: FunctionLowering, node: fx.Node) -> Value:
    scale = state.bank.input_scale(state.emitter, state.weight_name(node))
    return state.emitter.round_to_bytes(state.name(node), state.value(node, 0), scale)


def _rms_norm(state: FunctionLowering, node: fx.Node) -> Value:
    epsilon = node.args[2]
    assert isinstance(epsilon, float)
    norm = wide_rms_norm if state.style.wide else scaled_rms_norm
    return norm(
        state.emitter, state.name(node), state.value(node, 0), state.floating(node), epsilon
    )


def _rope(state: FunctionLowering, node: fx.Node) -> Value:
    return state.attention.rope(node)


def _attention(state: FunctionLowering, node: fx.Node) -> Value:
    return state.attention.emit(node)


def _add(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.binary("add", state.name(node), state.value(node, 0), state.value(node, 1))


def _mul(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.binary("mul", state.name(node), state.value(node, 0), state.value(node, 1))


def _silu(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.unary("silu", state.name(node), state.value(node, 0))


def _view(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.reshape(state.name(node), state.value(node, 0), state.dims(node))


def _split(state: FunctionLowering, node: fx.Node) -> Value:
    sizes = node.args[1]
    assert isinstance(sizes, list)
    names = [f"{state.name(node)}_part_{index}" for index in range(len(sizes))]
    source = state.value(node, 0)
    state.split_results(node, state.emitter.split(names, source, sizes))
    return source


def _last(state: FunctionLowering, node: fx.Node) -> Value:
    return state.emitter.last_position(state.name(node), state.value(node, 0))


HANDLERS: dict[object, Callable[[FunctionLowering, fx.Node], Value]] = {
    dialect.EMBEDDING: _embedding,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.ROUND_PER_TENSOR: _round_per_tensor,
    dialect.RMS_NORM: _rms_norm,
    dialect.ROPE: _rope,
    dialect.ATTENTION: _attention,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _silu,
    dialect.VIEW: _view,
    dialect.SPLIT: _split,
    dialect.LAST: _last,
}
