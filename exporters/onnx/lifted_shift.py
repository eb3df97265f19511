"""Lifts each token's predecessor and its state; see `exporters.onnx.token_shift`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from exporters.lifted import (
    Constant,
    Numbers,
    Recent,
    Unknown,
    Value,
    row_numbers,
)
from exporters.lifted_recurrent import (
    Previous,
)
from exporters.onnx.lifted_convolution import BEFORE, LAST, ROW_OF_A_SHIFT
from exporters.onnx.lifted_values import Graph, Lifted

if TYPE_CHECKING:
    from onnx import NodeProto

# The kind of one of the tokens before a call.
_ONE: Final = "one token before"


def slice_of(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts one of the tokens before a call, and a row without its last token."""
    source, *numbers = given
    bounds = tuple(_number(each) for each in numbers)
    if not isinstance(source, Unknown) or len(bounds) != 3 or bounds[2] != 1:
        return None
    first, stop, _ = bounds
    if source.kind == BEFORE and first is not None and stop == first + 1 and stop > 0:
        return (Unknown(f"{first}", _ONE, source.operands),)
    if source.kind != ROW_OF_A_SHIFT or (first, stop) != (0, -1):
        return None
    before, tokens = source.operands
    assert isinstance(before, Unknown)
    begins, state = before.operands
    assert isinstance(begins, Numbers)
    ignored = tuple(bool(array.ravel()[0]) for array in begins.arrays)
    read = _named(state.name, int(before.name))
    return (Previous(node.output[0], tokens, Recent(read, _written(graph, source), ignored)),)


def concat(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the row of the token before a call and its own."""
    if len(given) != 2 or attributes.get("axis") != 1:
        return None
    before = given[0]
    if not (isinstance(before, Unknown) and before.kind == _ONE):
        return None
    return (Unknown(node.output[0], ROW_OF_A_SHIFT, given),)


def _written(graph: Graph, row: Unknown) -> str:
    """The state that gets a row's last token; what it would be where none does."""
    wanted = tuple((probe.count,) for probe in graph.probes)
    for value in list(graph.values.values()):
        if not (isinstance(value, Unknown) and value.kind == LAST and value.operands[0] is row):
            continue
        for joined in graph.users(value.name, "Concat"):
            place = list(joined.input).index(value.name)
            for turned in graph.users(joined.output[0], "Transpose"):
                name = turned.output[0]
                if name in graph.outputs:
                    rows = row_numbers(value.operands[1], len(graph.probes))
                    own = _named(name, place)
                    return own if rows == wanted else f"{own}, of other tokens"
    return f"{row.name}, no output"


_PARTS: Final = ("recent", "mlp_recent")


def _named(name: str, place: int) -> str:
    """A shift's part of a layer's state: ``3.recent`` or ``3.mlp_recent``."""
    layer = name.removeprefix("past_key_values.").removeprefix("present.").split(".")[0]
    return f"{layer}.{_PARTS[place] if place < len(_PARTS) else place}"


def _number(value: Value) -> int | None:
    if isinstance(value, Constant) and value.array.size == 1:
        return int(value.array.ravel()[0])
    return None
