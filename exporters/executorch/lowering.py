"""Walks a program and emits one method: delegates, and the kernels between them.

XNNPACK computes whatever is neither an embedding nor attention. Attention and its caches are
kernels of ExecuTorch's own, so that every attention ends one delegate and the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import fx

from exporters.errors import ExportError
from exporters.executorch.attention import CacheDtype, Window, attention
from exporters.executorch.blobs import Blob
from exporters.executorch.lookups import embedding, format_of, last, quant_embedding
from exporters.executorch.method import MethodBuilder, ScalarType
from exporters.executorch.pte_file import PteFile
from exporters.executorch.xnnpack_graph import FP16, FP32, XnnpackGraph
from quant import dialect
from quant.program import Program, node_argument, shape_of
from quant.store import WeightStore

# Weights of a matrix that fits a core's cache: what its product costs is microseconds. Where
# rounding activations to 8 bits hurts most, in the head and after a gated product, whose few large
# values widen every other's steps, such a matrix is multiplied with them as they are.
SMALL: Final = 1 << 20
_KERNELS: Final[dict[object, Callable[[MethodLowering, fx.Node], None]]] = {
    dialect.EMBEDDING: embedding,
    dialect.QUANT_EMBEDDING: quant_embedding,
    dialect.ATTENTION: attention,
    dialect.LAST: last,
}


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


def origin(node: fx.Node) -> fx.Node:
    """What a selection of the last token selects from; any other node is its own."""
    return node_argument(node, 0) if node.target is dialect.LAST else node


class MethodLowering:
    """Lowers a program to a method of a file.

    Args:
        program: in the lowered dialect.
        store: the weights it names.
        file: where weights, constants and delegates go.
        name: the method's.
        tokens: how many one run takes at most.
        cache_dtype: of keys and values as they are kept, and as attention reads them.
    """

    def __init__(
        self,
        program: Program,
        store: WeightStore,
        file: PteFile,
        name: str,
        tokens: int,
        cache_dtype: CacheDtype = "float32",
    ) -> None:
        self.cache_dtype: CacheDtype = cache_dtype
        self.program, self.store, self.file, self.limit = program, store, file, tokens
        self.method = MethodBuilder(name)
        self.tensors: dict[fx.Node, int] = {}  # values of the method
        self._local: dict[fx.Node, int] = {}  # values of the delegate at hand
        self.graph = XnnpackGraph(file, store)
        self._arguments: list[int] = []  # of the delegate at hand
        self._rows: dict[str, int] = {}  # values of the rotary tables' rows
        self._given_rows: dict[str, int] = {}  # likewise, in the delegate at hand
        self.windows: dict[int, Window] = {}
        self.exchanged: set[fx.Node] = set()  # embeddings with the columns of pairs exchanged

    def run(self) -> MethodBuilder:
        """Emits the whole method."""
        method, table = self.method, next(iter(self.program.tables.values()))
        self.ids = method.input("int64", [1, self.limit], dynamic=True)
        self.position = method.input("int64", [1], dynamic=False)
        self.start, self.end = method.computed_integer(), method.computed_integer()
        count, one = method.computed_integer(), method.integer(1)
        method.call("aten::sym_size", "int", self.ids, one, count)
        method.call("aten::_local_scalar_dense", "", self.position, self.start)
        method.call("executorch_prim::add", "Scalar", self.start, count, self.end)
        for name, values in self.program.tables.items():
            whole = self.table(name, values.numpy().tobytes(), list(table.shape))
            rows = method.tensor("float32", [self.limit, table.shape[1]], dynamic=True)
            self.slice(whole, 0, self.start, self.end, rows)
            self._rows[name] = rows
        output = self.program.output()
        for stage in stages_of(self.program):
            if stage.nodes:
                self._delegate(stage, output)
            for node in stage.kernels:
                _KERNELS[node.target](self, node)
        method.output(self.tensors[output])
        return method

    def dims(self, node: fx.Node) -> list[int]:
        """A node's shape, the tokens at their most."""
        return [self.limit if dim == -1 else dim for dim in shape_of(node)]

    def is_dynamic(self, node: fx.Node) -> bool:
        """Whether a node's shape depends on the number of tokens."""
        return -1 in shape_of(node)

    def table(self, key: str, data: bytes, shape: list[int]) -> int:
        """A float32 constant that is made here and no weight, under a key that says what it is."""
        return self.method.constant("float32", shape, self.file.constant(key, Blob(data)), key)

    def weight_table(self, key: str, blob: Blob, dtype: ScalarType, shape: Sequence[int]) -> int:
        """A weight, or a part of one, that a kernel reads."""
        buffer = self.file.table(key, blob, dtype, shape)
        return self.method.constant(dtype, shape, buffer, key)

    def shares_head(self, node: fx.Node) -> bool:
        """Whether an embedding's table and the head's matrix are the same bytes of a file."""
        if self.file.weights is None:
            return False
        table = node_argument(node, 1)
        # A small head in groups lies there group by group, see `XnnpackGraph.exact_linear`.
        return any(
            user.target is dialect.QUANT_LINEAR
            and (format_of(user).group_size is None or not is_exact(self, user))
            for user in table.users
        )

    def slice(self, source: int, axis: int, start: int, end: int, out: int) -> None:
        """Copies ``source[start:end]`` along an axis; its bounds are values of the method."""
        method = self.method
        method.call(
            "aten::slice_copy",
            "Tensor_out",
            *(source, method.integer(axis), start, end, method.integer(1)),
            out=out,
        )

    def _delegate(self, stage: _Stage, output: fx.Node) -> None:
        """Emits one delegate; what later stages need of it becomes tensors of the method."""
        self.graph, self._local, self._arguments = XnnpackGraph(self.file, self.store), {}, []
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
                self.graph.output(self._local[node])
                dims = self.graph.dims(self._local[node])
                self.tensors[node] = self.method.tensor(
                    "float32", dims, dynamic=self.is_dynamic(node)
                )
                self._arguments.append(self.tensors[node])
        self.method.delegate(self.file.payload(self.graph.encode()), self._arguments)

    def value(self, node: fx.Node) -> int:
        """A node's value within the delegate at hand; made an input when it comes from before."""
        if node not in self._local:
            half = self.outer_dtype(node) == "float16"
            given = self.graph.input(self.outer_dims(node), FP16 if half else FP32)
            self._arguments.append(self.tensors[node])
            self._local[node] = self.graph.unary("XNNConvert", given) if half else given
            if origin(node) in self.exchanged:
                self._local[node] = self._exchange(given)
            if origin(node).target is dialect.ATTENTION:
                self._local[node] = self.graph.reshape(given, shape_of(node))
        return self._local[node]

    def _exchange(self, source: int) -> int:
        """Exchanges the columns of each pair."""
        graph, width = self.graph, self.graph.dims(source)[-1]
        pairs = graph.reshape(source, [1, -1, width // 2, 2])
        turned = graph.concatenate([graph.columns(pairs, 1, 2), graph.columns(pairs, 0, 1)])
        return graph.reshape(turned, [1, -1, width])

    def outer_dims(self, node: fx.Node) -> list[int]:
        """The shape of a tensor of the method: attention's has its heads apart."""
        source, dims = origin(node), self.dims(node)
        if source.target is dialect.ATTENTION:
            return [*dims[:2], *self.dims(node_argument(source, 0))[2:]]
        return dims

    def outer_dtype(self, node: fx.Node) -> ScalarType:
        """The dtype of a tensor of the method: rows of a float16 table are float16."""
        source = origin(node)
        return self.table_dtype(source) if source.target is dialect.EMBEDDING else "float32"

    def rows(self, name: str, width: int) -> int:
        """A rotary table's rows for these tokens in the delegate at hand: ``[1, t, 1, width]``."""
        if name not in self._given_rows:
            given = self.graph.input([self.limit, width])
            self._arguments.append(self._rows[name])
            self._given_rows[name] = self.graph.reshape(given, [1, -1, 1, width])
        return self._given_rows[name]

    def weight_name(self, node: fx.Node, index: int) -> str:
        """The weight that an argument is a part of."""
        return self.program.inputs[node_argument(node, index).name].name

    def table_dtype(self, node: fx.Node) -> ScalarType:
        """What an embedding of floats holds in the file."""
        extent = self.store.extents(self.weight_name(node, 1))["value"]
        return "float16" if extent.dtype == "F16" else "float32"


def _linear(state: MethodLowering, node: fx.Node) -> int:
    source = state.value(node_argument(node, 0))
    name = state.weight_name(node, 1)
    weight = state.graph.weight(name, shape_of(node_argument(node, 1)))
    return state.graph.linear(source, weight)


def _quant_linear(state: MethodLowering, node: fx.Node) -> int:
    source, codes = node_argument(node, 0), node_argument(node, 1)
    exact = is_exact(state, node)
    product = state.graph.exact_linear if exact else state.graph.quantized_linear
    rows = shape_of(codes)[0]
    return product(state.value(source), state.weight_name(node, 1), format_of(node), rows)


def is_exact(state: MethodLowering, node: fx.Node) -> bool:
    """Whether a product with integers leaves its activations float32."""
    source, (rows, stored) = node_argument(node, 0), shape_of(node_argument(node, 1))
    if source.target is dialect.ROUND_PER_TOKEN:
        return False
    small = rows * stored * 8 // format_of(node).bits <= SMALL
    return small and (source.target is dialect.MUL or node is state.program.output())


def _round_per_token(state: MethodLowering, node: fx.Node) -> int:
    """What XNNPACK does before its product: `XnnpackGraph.quantized_linear` takes it along."""
    return state.value(node_argument(node, 0))


def _rms_norm(state: MethodLowering, node: fx.Node) -> int:
    """The mean of squares is a product by a row of 1/n: XNNPACK's graphs here have no mean."""
    graph, source = state.graph, state.value(node_argument(node, 0))
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
    graph, source = state.graph, state.value(node_argument(node, 0))
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
    return state.graph.binary("XNNAdd", first, second)


def _mul(state: MethodLowering, node: fx.Node) -> int:
    first, second = (state.value(node_argument(node, index)) for index in (0, 1))
    return state.graph.binary("XNNMultiply", first, second)


def _silu(state: MethodLowering, node: fx.Node) -> int:
    source = state.value(node_argument(node, 0))
    gate = state.graph.unary("XNNSigmoid", source)
    return state.graph.binary("XNNMultiply", source, gate)


def _view(state: MethodLowering, node: fx.Node) -> int:
    return state.graph.reshape(state.value(node_argument(node, 0)), shape_of(node))


def _split(state: MethodLowering, node: fx.Node) -> None:
    """Its parts are cut out one by one where they are used, see `_get`."""


def _get(state: MethodLowering, node: fx.Node) -> int:
    split, index = node_argument(node, 0), node.args[1]
    sizes = split.args[1]
    assert isinstance(sizes, list) and isinstance(index, int)
    start = sum(sizes[:index])
    source = state.value(node_argument(split, 0))
    return state.graph.columns(source, start, start + sizes[index])


_DELEGATE_HANDLERS: dict[object, Callable[[MethodLowering, fx.Node], int | None]] = {
    dialect.LINEAR: _linear,
    dialect.QUANT_LINEAR: _quant_linear,
    dialect.ROUND_PER_TOKEN: _round_per_token,
    dialect.RMS_NORM: _rms_norm,
    dialect.ROPE: _rope,
    dialect.ADD: _add,
    dialect.MUL: _mul,
    dialect.SILU: _silu,
    dialect.VIEW: _view,
    dialect.SPLIT: _split,
    dialect.GET: _get,
}
