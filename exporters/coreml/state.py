"""The state that the handlers of operators share while a program is lowered to one function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from torch import fx

from exporters.coreml.emitter import Emitter
from exporters.coreml.function import Shape, Value
from exporters.coreml.names import LOGITS, POSITION, TOKENS
from exporters.coreml.stream import around_recurrences, router_logits, wide_stream
from exporters.coreml.weights import Weight, WeightBank
from quant.formats.formats import PaletteFormat
from quant.program.calls import GetCall, QuantizedCall
from quant.program.program import Program, node_argument, shape_of

Profile = Literal["gpu", "ane"]
Opset = Literal["ios17", "ios18"]

OPSETS: Final[dict[Opset, tuple[str, int]]] = {"ios17": ("CoreML7", 8), "ios18": ("CoreML8", 9)}
"""MIL's name and the specification's version for each generation of operators."""


@dataclass(frozen=True)
class Style:
    """How functions are written.

    Attributes:
        profile: the processor that the functions are written for.
        opset: the generation of operators.
        one_hot: whether caches are written by a product with one-hot rows.
        context: the length of the caches, in tokens.
    """

    profile: Profile
    opset: Opset
    one_hot: bool
    context: int

    @property
    def states(self) -> bool:
        """Whether caches are states; otherwise they are inputs and outputs."""
        return self.opset == "ios18"

    @property
    def wide(self) -> bool:
        """Whether float32 operations are used where float16 would lose precision."""
        return self.profile == "gpu"


class FunctionLowering:
    """The state of lowering a program to one function for a number of tokens.

    Args:
        program: the program, in the quantized or the lowered dialect.
        bank: the weights that the program names.
        name: the function's name.
        tokens: how many tokens a call takes; -1 when the caller chooses among several numbers.
        style: how the function is written.
        most_tokens: the largest of these numbers; by default the only one.

    Attributes:
        ids: the tokens, ``int32[1, t]``.
        position: how many tokens are cached, ``int32[1]``.
    """

    def __init__(
        self,
        program: Program,
        bank: WeightBank,
        name: str,
        tokens: int,
        style: Style,
        most_tokens: int | None = None,
    ) -> None:
        self.program, self.bank, self.style, self.tokens = program, bank, style, tokens
        self.most_tokens = tokens if most_tokens is None else most_tokens
        assert self.most_tokens > 0, "a function for several numbers of tokens needs the largest"
        self.emitter = Emitter(name, OPSETS[style.opset][0])
        self._wide = around_recurrences(program, products=style.wide)
        if style.wide:
            self._wide |= wide_stream(program) | router_logits(program)
        self._values: dict[fx.Node, Value] = {}
        self._unrounded: dict[fx.Node, Value] = {}

        self.ids = self.emitter.input(TOKENS, "int32", (1, tokens))
        self.position = self.emitter.input(POSITION, "int32", (1,))

    def hold(self, node: fx.Node, value: Value) -> None:
        """Records the function's value that holds a node's result."""
        self._values[node] = value

    def hold_unrounded(self, node: fx.Node, value: Value) -> None:
        """Records the float32 value that was rounded to give a node's result."""
        self._unrounded[node] = value

    def holds(self, node: fx.Node) -> bool:
        """Whether a node's result was emitted already, by another node's handler."""
        return node in self._values

    def result(self, node: fx.Node) -> Value:
        """The function's value that holds a node's result."""
        return self._values[node]

    def given(self, node: fx.Node, index: int) -> Value:
        """The function's value that holds one of a node's arguments, in the dtype that it has."""
        return self._values[node_argument(node, index)]

    def value(self, node: fx.Node, index: int) -> Value:
        """One of a node's arguments as float16."""
        given = self.given(node, index)
        return self.emitter.cast_once(f"{given.name}_as_fp16", given, "fp16")

    def unrounded(self, node: fx.Node, index: int) -> Value:
        """One of a node's arguments as it was before float16 rounded it, where that is held."""
        return self._unrounded.get(node_argument(node, index)) or self.given(node, index)

    def stays_wide(self, node: fx.Node) -> bool:
        """Whether a node's result is float32.

        For the GPU, residual streams that must be and routers' logits; for both, what is around a
        recurrence.
        """
        return node in self._wide

    def name(self, node: fx.Node) -> str:
        """The name of a node's result."""
        return LOGITS if node is self.program.output() else f"op_{node.name}"

    def dims(self, node: fx.Node) -> Shape:
        """A node's shape for this function's number of tokens."""
        return tuple(self.tokens if dim == -1 else dim for dim in shape_of(node))

    def weight_name(self, node: fx.Node, index: int = 1) -> str:
        """The name of the weight that an argument is, or is a part of."""
        return self.program.inputs[node_argument(node, index).name].name

    def floating(self, node: fx.Node) -> Value:
        """The float weight that is a node's second argument."""
        return self.float_weight(node_argument(node, 1))

    def float_weight(self, source: fx.Node) -> Value:
        """The float weight of an input."""
        weight = self.program.inputs[source.name].name
        return self.bank.floating(self.emitter, weight, shape_of(source))

    def quantized(self, node: fx.Node) -> Weight:
        """The quantized weight that a node reads."""
        call, weight = QuantizedCall.of(node), self.weight_name(node)
        if isinstance(call.format, PaletteFormat):
            return Weight(self.bank.palette(self.emitter, weight, call.format, call.shape))
        return self.bank.integer(self.emitter, weight, call.format, call.shape)

    def split_results(self, node: fx.Node, pieces: list[Value]) -> None:
        """Records the values of the nodes that take the parts of a split."""
        for user in node.users:
            self._values[user] = pieces[GetCall.of(user).index]
