"""Lowers a traced module to one ONNX graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from onnx import helper
from torch import fx
from torch.export.graph_signature import InputKind

from exporters.errors import ExportError
from exporters.modules.onnx import elementwise, layers, shapes
from exporters.modules.onnx.dtypes import element_of
from exporters.modules.onnx.state import State
from exporters.modules.onnx.weights import dequantized, emit_embedding, emit_linear
from exporters.modules.traced import PREFIX, ModuleValue, user_line
from exporters.onnx.graph import GraphBuilder
from exporters.vendor_output import quiet

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

    from exporters.modules.target import ModuleRequest
    from exporters.onnx.weight_file import WeightFile

aten = torch.ops.aten


def lower(request: ModuleRequest, weights: WeightFile) -> ModelProto:
    """Lowers a traced module to a graph whose large initializers are in the weight file.

    Raises:
        ExportError: an operator has no handler; the message shows the line that it came from.
    """
    traced = request.traced
    with quiet("torch.export", "this module", "onnx"):
        program = traced.program.run_decompositions(_decompositions())
    state = State(request, GraphBuilder(weights), dequantized)
    inputs = iter(traced.inputs)
    kinds = {each.arg.name: each for each in program.graph_signature.input_specs}
    program.graph.eliminate_dead_code()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind == InputKind.USER_INPUT:
                state.names[node] = next(inputs).name
            else:
                assert spec.target is not None
                state.parameters[node] = spec.target.removeprefix(PREFIX)
        elif node.op == "call_function":
            _emit(state, node)
    results = program.graph.output_node().args[0]
    for result, output in zip(results, traced.outputs, strict=True):
        state.builder.node("Identity", [state.value(result)], output.name)
    given, made = ([_info(value) for value in values] for values in (traced.inputs, traced.outputs))
    return state.builder.model(given, made, "module")


def _emit(state: State, node: fx.Node) -> None:
    if node.target in _SILENT:
        return
    if node.target in _WEIGHTED:
        _WEIGHTED[node.target](state, node)
        return
    handler = HANDLERS.get(node.target)
    if handler is None:
        raise ExportError(
            f"the ONNX target has no handler for {node.target}{user_line(node)}: leave onnx out of "
            f"--target, or write that line with other operators"
        )
    state.names[node] = handler(state, node)


def _decompositions() -> Any:
    """Torch's decompositions to its core operators, without those that have handlers here."""
    table: Any = torch.export.default_decompositions()
    for kept in (*HANDLERS, *_WEIGHTED):
        if isinstance(kept, torch._ops.OpOverload):
            table.pop(kept, None)
    return table


def _info(value: ModuleValue) -> ValueInfoProto:
    return helper.make_tensor_value_info(
        value.name, element_of(getattr(torch, value.dtype)), list(value.dims)
    )


def _arithmetic(op: str) -> Callable[[State, fx.Node], str]:
    """An operation on whole numbers of the graph."""

    def handle(state: State, node: fx.Node) -> str:
        return state.emit(op, [state.value(each, torch.int64) for each in node.args], node.name)

    return handle


_SILENT: Final = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten.sym_constrain_range_for_size.default,
        aten.sym_constrain_range.default,
        operator.ge,
        operator.le,
        operator.gt,
        operator.lt,
        operator.eq,
        operator.ne,
    }
)
"""Checks of what torch.export assumed: the runtime checks shapes by itself."""
_WEIGHTED: Final[Mapping[Any, Callable[[State, fx.Node], None]]] = {
    aten.linear.default: emit_linear,
    aten.embedding.default: emit_embedding,
}
HANDLERS: Final[Mapping[Any, Callable[[State, fx.Node], str]]] = {
    **elementwise.HANDLERS,
    **shapes.HANDLERS,
    **layers.HANDLERS,
    operator.getitem: shapes.GET,
    operator.add: _arithmetic("Add"),
    operator.sub: _arithmetic("Sub"),
    operator.mul: _arithmetic("Mul"),
    operator.floordiv: _arithmetic("Div"),
    operator.mod: _arithmetic("Mod"),
    torch.sym_max: _arithmetic("Max"),
    torch.sym_min: _arithmetic("Min"),
}
