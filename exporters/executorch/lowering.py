"""Walks a program and emits one method: delegates, and the kernels between them.

XNNPACK computes whatever is neither an embedding nor attention. Attention and its caches are
kernels of ExecuTorch's own, so that every attention ends one delegate and the next begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from torch import fx

from exporters.errors import ExportError
from exporters.executorch.blobs import NIBBLES_SWAPPED, SIGNED, WIDE, WIDENED, Blob
from exporters.executorch.method import SCALAR_TYPES, MethodBuilder, ScalarType
from exporters.executorch.pte_file import PteFile
from exporters.executorch.xnnpack_graph import FP16, FP32, XnnpackGraph
from quant import dialect
from quant.formats import IntFormat, parse_format
from quant.program import Program, node_argument, shape_of
from quant.store import WeightStore

# Weights of a matrix that fits a core's cache: what its product costs is microseconds. Where
# rounding activations to 8 bits hurts most, in the head and after a gated product, whose few large
# values widen every other's steps, such a matrix is multiplied with them as they are.
SMALL: Final = 1 << 20
_HIDDEN: Final = -1e30  # added to the score of a token that is out of the window: exp gives 0
_LAST_INDEX: Final = 2**63 - 1
_KERNELS: Final = frozenset(
    {dialect.EMBEDDING, dialect.QUANT_EMBEDDING, dialect.ATTENTION, dialect.LAST}
)


@dataclass
class _Stage:
    """A delegate, and the kernels that run after it.

    Attributes:
        nodes: of the delegate, in order.
        kernels: nodes that run after it.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    kernels: list[fx.Node] = field(default_factory=list)


def stages_of(program: Program) -> list[_Stage]:
    """Sorts a program's nodes into delegates and what runs between them.

    A delegate's node goes to the first delegate at which all its inputs are there; a kernel right
    after the delegate that makes the last of its inputs.
    """
    stage: dict[fx.Node, int] = {}
    found: list[_Stage] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is dialect.SIZE:
            continue
        sources = [source for source in node.all_input_nodes if source in stage]
        if node.target in _KERNELS:
            stage[node] = max((stage[source] for source in sources), default=0)
        else:
            stage[node] = max(
                (stage[source] + (source.target in _KERNELS) for source in sources), default=0
            )
        while len(found) <= stage[node]:
            found.append(_Stage())
        kind = found[stage[node]].kernels if node.target in _KERNELS else found[stage[node]].nodes
        kind.append(node)
    return found


class MethodLowering:
    """Lowers a program to a method of a file.

    Args:
        program: in the lowered dialect.
        store: the weights it names.
        file: where weights, constants and delegates go.
        name: the method's.
        tokens: how many one run takes at most.
    """

    def __init__(
        self, program: Program, store: WeightStore, file: PteFile, name: str, tokens: int
    ) -> None:
        self.program, self.store, self.file, self.limit = program, store, file, tokens
        self.method = MethodBuilder(name)
        self._tensors: dict[fx.Node, int] = {}  # values of the method
        self._local: dict[fx.Node, int] = {}  # values of the delegate at hand
        self._graph = XnnpackGraph(file, store)
        self._arguments: list[int] = []  # of the delegate at hand
        self._rows: dict[str, int] = {}  # values of the rotary tables' rows
        self._given_rows: dict[str, int] = {}  # likewise, in the delegate at hand
        self._windows: dict[int, _Window] = {}

    def run(self) -> MethodBuilder:
        """Emits the whole method."""
        method, table = self.method, next(iter(self.program.tables.values()))
        self._ids = method.input("int64", [1, self.limit], dynamic=True)
        self._position = method.input("int64", [1], dynamic=False)
        self._start, self._end = method.computed_integer(), method.computed_integer()
        count, one = method.computed_integer(), method.integer(1)
        method.call("aten::sym_size", "int", self._ids, one, count)
        method.call("aten::_local_scalar_dense", "", self._position, self._start)
        method.call("executorch_prim::add", "Scalar", self._start, count, self._end)
        for name, values in self.program.tables.items():
            whole = self._table(name, values.numpy().tobytes(), list(table.shape))
            rows = method.tensor("float32", [self.limit, table.shape[1]], dynamic=True)
            self._slice(whole, 0, self._start, self._end, rows)
            self._rows[name] = rows
        output = self.program.output()
        for stage in stages_of(self.program):
            if stage.nodes:
                self._delegate(stage, output)
            for node in stage.kernels:
                _KERNEL_HANDLERS[node.target](self, node)
        method.output(self._tensors[output])
        return method

    def dims(self, node: fx.Node) -> list[int]:
        """A node's shape, the tokens at their most."""
        return [self.limit if dim == -1 else dim for dim in shape_of(node)]

    def is_dynamic(self, node: fx.Node) -> bool:
        """Whether a node's shape depends on the number of tokens."""
        return -1 in shape_of(node)

    def _table(self, key: str, data: bytes, shape: list[int]) -> int:
        return self.method.constant("float32", shape, self.file.constant(key, Blob(data)), key)

    def _slice(self, source: int, axis: int, start: int, end: int, out: int) -> None:
        method = self.method
        method.call(
            "aten::slice_copy",
            "Tensor_out",
            *(source, method.integer(axis), start, end, method.integer(1)),
            out=out,
        )

    def _delegate(self, stage: _Stage, output: fx.Node) -> None:
        """Emits one delegate; what later stages need of it becomes tensors of the method."""
        self._graph, self._local, self._arguments = XnnpackGraph(self.file, self.store), {}, []
        self._given_rows = {}
        inside = set(stage.nodes)
        for node in stage.nodes:
            handler = _DELEGATE_HANDLERS.get(node.target)
            if handler is None:
                raise ExportError(
                    f"the ExecuTorch target has no handler for {node.target} at {node.name}"
                )
            value = handler(self, node)
            if value is not None:
                self._local[node] = value
        for node in stage.nodes:
            leaves = node is output or any(
                user not in inside and user.target is not dialect.SIZE for user in node.users
            )
            if node in self._local and leaves:
                self._graph.output(self._local[node])
                dims = self._graph.dims(self._local[node])
                self._tensors[node] = self.method.tensor(
                    "float32", dims, dynamic=self.is_dynamic(node)
                )
                self._arguments.append(self._tensors[node])
        self.method.delegate(self.file.payload(self._graph.encode()), self._arguments)

    def value(self, node: fx.Node) -> int:
        """A node's value within the delegate at hand; made an input when it comes from before."""
        if node not in self._local:
            half = node.target is dialect.EMBEDDING and self._table_dtype(node) == "float16"
            given = self._graph.input(self._outer_dims(node), FP16 if half else FP32)
            self._arguments.append(self._tensors[node])
            self._local[node] = self._graph.unary("XNNConvert", given) if half else given
            if node.target is dialect.ATTENTION or (
                node.target is dialect.LAST and node_argument(node, 0).target is dialect.ATTENTION
            ):
                self._local[node] = self._graph.reshape(given, shape_of(node))
        return self._local[node]

    def _outer_dims(self, node: fx.Node) -> list[int]:
        """The shape of a tensor of the method: attention's has its heads apart."""
        source = node_argument(node, 0) if node.target is dialect.LAST else node
        dims = self.dims(node)
        if source.target is dialect.ATTENTION:
            return [*dims[:2], *self.dims(node_argument(source, 0))[2:]]
        return dims

    def rows(self, name: str, width: int) -> int:
        """A rotary table's rows for these tokens in the delegate at hand: ``[1, t, 1, width]``."""
        if name not in self._given_rows:
            given = self._graph.input([self.limit, width])
            self._arguments.append(self._rows[name])
            self._given_rows[name] = self._graph.reshape(given, [1, -1, 1, width])
        return self._given_rows[name]

    def weight_name(self, node: fx.Node, index: int) -> str:
        """The weight that an argument is a part of."""
        return self.program.inputs[node_argument(node, index).name].name

    def _table_dtype(self, node: fx.Node) -> ScalarType:
        extent = self.store.extents(self.weight_name(node, 1))["value"]
        return "float16" if extent.dtype == "F16" else "float32"


def _embedding(state: MethodLowering, node: fx.Node) -> None:
    name, method = state.weight_name(node, 1), state.method
    extent = state.store.extents(name)["value"]
    dtype = state._table_dtype(node)
    wide = extent.dtype == "BF16"
    key = f"{name} {WIDE}" if wide else name
    buffer = state.file.constant(key, Blob(extent, WIDENED if wide else None))
    table = method.constant(dtype, shape_of(node_argument(node, 1)), buffer, key)
    state._tensors[node] = out = method.tensor(dtype, state.dims(node), dynamic=True)
    absent, no = method.integer(-1), method.boolean(False)
    method.call("aten::embedding", "out", table, state._ids, absent, no, no, out=out)


def _quant_embedding(state: MethodLowering, node: fx.Node) -> None:
    """Rows of a table in integers; ExecuTorch's own kernel looks them up."""
    name, method = state.weight_name(node, 1), state.method
    format = parse_format(str(node.args[4]))
    assert isinstance(format, IntFormat)
    extents = state.store.extents(name)
    conversion = NIBBLES_SWAPPED if format.bits == 4 else SIGNED
    codes = state.file.constant(f"{name} rows", Blob(extents["codes"], conversion))
    scale = state.file.constant(f"{name} row scale", Blob(extents["scale"]))
    dtype: ScalarType = "uint8" if format.bits == 4 else "int8"
    state._tensors[node] = out = method.tensor("float32", state.dims(node), dynamic=True)
    half = format.implicit_zero_point
    method.call(
        f"quantized_decomposed::embedding_{'4bit' if format.bits == 4 else 'byte'}",
        "dtype_out",
        method.constant(dtype, extents["codes"].shape, codes, f"{name} rows"),
        method.constant("bfloat16", extents["scale"].shape, scale, f"{name} row scale"),
        *(method.none(), method.integer(-half), method.integer(half - 1)),
        *(state._ids, method.integer(SCALAR_TYPES["float32"][0])),
        out=out,
    )


def _last(state: MethodLowering, node: fx.Node) -> None:
    method, source = state.method, node_argument(node, 0)
    out = state._tensors[node] = method.tensor("float32", state._outer_dims(node), dynamic=False)
    ends = method.integer(-1), method.integer(_LAST_INDEX)
    state._slice(state._tensors[source], 1, *ends, out)


def _attention(state: MethodLowering, node: fx.Node) -> None:
    method = state.method
    q, k, v = (state._tensors[node_argument(node, index)] for index in range(3))
    _, kv_heads, context, width = shape_of(node_argument(node, 3))
    caches = [method.state("float32", [1, context, kv_heads, width]) for _ in range(2)]
    for cache, new in zip(caches, (k, v), strict=True):
        unused = method.tensor("float32", [1], dynamic=False)
        method.call("llama::update_cache", "out", new, cache, state._start, out=unused)
    window, scale = node.args[6], node.args[7]
    assert isinstance(window, int) and isinstance(scale, float)
    start, mask = state._start, method.none()
    if window:
        seen = _Window.of(state, window)
        start, mask = seen.position, seen.mask
        caches = [seen.cut(state, cache, [kv_heads, width]) for cache in caches]
    out = method.tensor("float32", state.dims(node_argument(node, 0)), dynamic=True)
    state._tensors[node] = out
    method.call(
        "llama::custom_sdpa",
        "out",
        *(q, *caches, start, mask, method.double(0.0)),
        *(method.boolean(not window), method.double(scale)),
        out=out,
    )


@dataclass(frozen=True)
class _Window:
    """What attention within a window needs, the same for every layer.

    Attributes:
        size: of the window.
        first: number of the first token that any of the new ones sees.
        position: of the first new token, counted from there.
        length: of what is seen, at most.
        mask: ``float32[t, seen]``: 0 where ``i - size < j <= i``, else so low that exp gives 0.
    """

    size: int
    first: int
    position: int
    length: int
    mask: int

    @classmethod
    def of(cls, state: MethodLowering, size: int) -> _Window:
        """The window of this size, made at the first layer that asks for it."""
        if size not in state._windows:
            state._windows[size] = cls._make(state, size)
        return state._windows[size]

    @classmethod
    def _make(cls, state: MethodLowering, size: int) -> _Window:
        method, context, limit = state.method, state.program.context, state.limit
        length = min(context, size - 1 + limit)
        before, first, position = (method.computed_integer() for _ in range(3))
        sub, greater = "executorch_prim::sub", "executorch_prim::sym_max"
        method.call(sub, "Scalar", state._start, method.integer(size - 1), before)
        method.call(greater, "Scalar", before, method.integer(0), first)
        method.call(sub, "Scalar", state._start, first, position)
        numbers = np.arange(context, dtype=np.float32).tobytes()
        rows = method.tensor("float32", [limit, 1], dynamic=True)
        table = state._table("numbers", numbers, [context, 1])
        state._slice(table, 0, state._start, state._end, rows)
        columns = method.tensor("float32", [1, length], dynamic=True)
        state._slice(state._table("numbers", numbers, [1, context]), 1, first, state._end, columns)

        def made(dtype: ScalarType) -> int:
            return method.tensor(dtype, [limit, length], dynamic=True)

        distance = made("float32")
        method.call("aten::sub", "out", rows, columns, method.integer(1), out=distance)
        past, near = made("bool"), made("bool")
        method.call("aten::ge", "Scalar_out", distance, method.integer(0), out=past)
        method.call("aten::lt", "Scalar_out", distance, method.integer(size), out=near)
        seen, mask = made("bool"), made("float32")
        method.call("aten::logical_and", "out", past, near, out=seen)
        shown, hidden = (
            state._table(name, np.array([value], np.float32).tobytes(), [1])
            for name, value in (("shown", 0.0), ("hidden", _HIDDEN))
        )
        method.call("aten::where", "self_out", seen, shown, hidden, out=mask)
        return cls(size, first, position, length, mask)

    def cut(self, state: MethodLowering, cache: int, dims: list[int]) -> int:
        """The tokens of a cache that are seen: attention reads no others when it has a mask."""
        out = state.method.tensor("float32", [1, self.length, *dims], dynamic=True)
        state._slice(cache, 1, self.first, state._end, out)
        return out


def _linear(state: MethodLowering, node: fx.Node) -> int:
    source = state.value(node_argument(node, 0))
    name = state.weight_name(node, 1)
    weight = state._graph.weight(name, shape_of(node_argument(node, 1)))
    return state._graph.linear(source, weight)


def _quant_linear(state: MethodLowering, node: fx.Node) -> int:
    format = parse_format(str(node.args[4]))
    assert isinstance(format, IntFormat)
    source, codes = node_argument(node, 0), node_argument(node, 1)
    rows, stored = shape_of(codes)
    small = rows * stored * 8 // format.bits <= SMALL
    exact = small and (source.target is dialect.MUL or node is state.program.output())
    product = state._graph.exact_linear if exact else state._graph.quantized_linear
    return product(state.value(source), state.weight_name(node, 1), format, rows)


def _rms_norm(state: MethodLowering, node: fx.Node) -> int:
    """The mean of squares is a product by a row of 1/n: XNNPACK's graphs here have no mean."""
    graph, source = state._graph, state.value(node_argument(node, 0))
    width = graph.dims(source)[-1]
    eps = node.args[2]
    assert isinstance(eps, float)
    mean = graph.constant(f"mean of {width}", [1 / width] * width, [1, width])
    small = graph.constant(f"epsilon {eps}", [eps], [1])
    squares = graph.binary("XNNMultiply", source, source)
    spread = graph.binary("XNNAdd", graph.linear(squares, mean), small)
    normed = graph.binary("XNNMultiply", source, graph.unary("XNNReciprocalSquareRoot", spread))
    weight = graph.weight(state.weight_name(node, 1), [width])
    return graph.binary("XNNMultiply", normed, weight)


def _rope(state: MethodLowering, node: fx.Node) -> int:
    graph, source = state._graph, state.value(node_argument(node, 0))
    half = shape_of(node_argument(node, 1))[1]
    dims = graph.dims(source)
    cos, sin = (
        state.rows(state.program.inputs[node_argument(node, index).name].name, half)
        for index in (1, 2)
    )
    first, second = graph.columns(source, 0, half), graph.columns(source, half, 2 * half)

    def product(value: int, table: int) -> int:
        return graph.binary("XNNMultiply", value, table)

    parts = [
        graph.binary("XNNSubtract", product(first, cos), product(second, sin)),
        graph.binary("XNNAdd", product(second, cos), product(first, sin)),
    ]
    if 2 * half < dims[-1]:
        parts.append(graph.columns(source, 2 * half, dims[-1]))
    return graph.concatenate(parts)


def _add(state: MethodLowering, node: fx.Node) -> int:
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state._graph.binary("XNNAdd", first, second)


def _mul(state: MethodLowering, node: fx.Node) -> int:
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state._graph.binary("XNNMultiply", first, second)


def _silu(state: MethodLowering, node: fx.Node) -> int:
    source = state.value(node_argument(node, 0))
    gate = state._graph.unary("XNNSigmoid", source)
    return state._graph.binary("XNNMultiply", source, gate)


def _view(state: MethodLowering, node: fx.Node) -> int:
    return state._graph.reshape(state.value(node_argument(node, 0)), shape_of(node))


def _split(state: MethodLowering, node: fx.Node) -> None:
    """Its parts are cut out one by one where they are used, see `_get`."""


def _get(state: MethodLowering, node: fx.Node) -> int:
    split, index = node_argument(node, 0), node.args[1]
    sizes = split.args[1]
    assert isinstance(sizes, list) and isinstance(index, int)
    start = sum(sizes[:index])
    source = state.value(node_argument(split, 0))
    return state._graph.columns(source, start, start + sizes[index])


_KERNEL_HANDLERS: dict[object, Callable[[MethodLowering, fx.Node], None]] = {
    dialect.EMBEDDING: _embedding,
    dialect.QUANT_EMBEDDING: _quant_embedding,
    dialect.ATTENTION: _attention,
    dialect.LAST: _last,
}
_DELEGATE_HANDLERS: dict[object, Callable[[MethodLowering, fx.Node], int | None]] = {
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.RMS_NORM: _rms_norm,
    dialect.ROPE: _rope,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _silu,
    dialect.VIEW: _view,
    dialect.SPLIT: _split,
    dialect.GET: _get,
}
