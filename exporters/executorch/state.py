"""The state of a walk that emits a method: what the handlers of operators read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import fx

from exporters.executorch.blobs import Blob
from exporters.executorch.method import MethodBuilder, ScalarType
from exporters.executorch.pte_file import PteFile
from exporters.executorch.xnnpack_graph import FP16, FP32, XnnpackGraph
from quant.program import dialect
from quant.program.calls import QuantizedCall
from quant.program.program import Program, node_argument, shape_of
from quant.store.store import WeightStore

CacheDtype = Literal["float32", "int8"]

# Weights of a matrix that fits a core's cache: what its product costs is microseconds. Where
# rounding activations to 8 bits hurts most, in the head and after a gated product, whose few large
# values widen every other's steps, such a matrix is multiplied with them as they are.
SMALL: Final = 1 << 20


@dataclass(frozen=True)
class Window:
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

    def begin(self) -> None:
        """Emits the method's inputs and the rotary tables' rows at their positions."""
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
            and (QuantizedCall.of(user).integers.group_size is None or not is_exact(self, user))
            for user in table.users
        )

    def slice(self, source: int, axis: int, start: int, end: int, out: int) -> None:
        """Copies ``source[start:end]`` along an axis; its bounds are values of the method."""
        method = self.method
        method.call(
            "aten::slice_copy",
            "Tensor_out",
            source,
            method.integer(axis),
            start,
            end,
            method.integer(1),
            out=out,
        )

    def begin_delegate(self) -> None:
        """Starts a delegate with an empty graph."""
        self.graph, self._local, self._arguments = XnnpackGraph(self.file, self.store), {}, []
        self._given_rows = {}

    def hold(self, node: fx.Node, value: int) -> None:
        """Notes which value of the delegate at hand a node is."""
        self._local[node] = value

    def end_delegate(self, nodes: Sequence[fx.Node], output: fx.Node) -> None:
        """Emits the delegate; what later stages need of its nodes becomes tensors of the method."""
        inside = set(nodes)
        for node in nodes:
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


def is_exact(state: MethodLowering, node: fx.Node) -> bool:
    """Whether a product with integers leaves its activations float32."""
    call = QuantizedCall.of(node)
    source, (rows, columns) = call.source, call.shape
    if source.target is dialect.ROUND_PER_TOKEN:
        return False
    return rows * columns <= SMALL and (
        source.target is dialect.MUL or node is state.program.output()
    )
