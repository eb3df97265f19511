"""The state that the handlers of operators share while a program is lowered to one method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from torch import fx

from exporters.executorch.blobs import Blob
from exporters.executorch.method import MethodBuilder, ScalarType
from exporters.executorch.pte_file import PteFile
from exporters.executorch.xnnpack_graph import FP16, FP32, XnnpackGraph
from exporters.float_columns import ALL, Columns, FloatColumns
from quant.program import dialect
from quant.program.calls import AttentionCall, QuantizedCall
from quant.program.head import head_of
from quant.program.program import Program, node_argument, shape_of
from quant.store.store import WeightStore

CacheDtype = Literal["float32", "int8"]

# A matrix of at most this many weights fits into a core's cache, and its product takes
# microseconds. Such a matrix is multiplied by unrounded activations where rounding them to 8 bits
# hurts most: in the head, and after a gated product, whose few large values make the steps of all
# others coarse.
SMALL: Final = 1 << 20
LAST_INDEX: Final = 2**63 - 1  # the end of a slice that goes to the end


@dataclass(frozen=True)
class Window:
    """The values that attention within a window needs, which all layers share.

    Attributes:
        size: the window's size, in tokens.
        first: the method's value that holds the position of the first token that any of the new
            tokens sees.
        position: the method's value that holds the first new token's position, counted from
            ``first``.
        length: the largest number of tokens that the new tokens see.
        mask: the method's value ``float32[t, seen]``: 0 where ``i - size < j <= i``, else so low
            that exp gives 0.
    """

    size: int
    first: int
    position: int
    length: int
    mask: int


@dataclass(frozen=True)
class Scored:
    """What a delegate needs to compute attention with bounded scores.

    Attributes:
        call: the attention.
        queries: the method's value ``float32[1, tokens, heads, width]``.
        keys: the method's value ``float32[1, seen, kv_heads, width]``.
        values: the method's value likewise.
        window: what the new tokens see.
        mask: the method's value ``float32[rows, seen]``, with a row for each new token of each
            query head that shares a key head; a single row where there is one token.
        tokens: the largest number of new tokens.
    """

    call: AttentionCall
    queries: int
    keys: int
    values: int
    window: Window
    mask: int
    tokens: int

    @property
    def groups(self) -> int:
        """How many query heads share a key head."""
        return shape_of(self.call.q)[2] // shape_of(self.call.k)[2]


def origin(node: fx.Node) -> fx.Node:
    """The operand of a selection of last tokens; for any other node, the node itself."""
    return node_argument(node, 0) if node.target is dialect.LAST else node


class MethodLowering:
    """The state of lowering a program to one method of a file.

    Args:
        program: the program, in the quantized or the lowered dialect.
        store: the store of the weights that the program names.
        file: the file that takes weights, constants and delegates' programs.
        name: the method's name.
        tokens: how many tokens one run takes at most.
        cache_dtype: the dtype in which the caches hold keys and values and attention reads them.
        float_columns: the columns whose activations are to stay float32, by weight.

    Attributes:
        kept: the columns whose activations stay float32 in this method, by weight.
    """

    def __init__(
        self,
        program: Program,
        store: WeightStore,
        file: PteFile,
        name: str,
        tokens: int,
        cache_dtype: CacheDtype = "float32",
        float_columns: FloatColumns | None = None,
    ) -> None:
        self.cache_dtype: CacheDtype = cache_dtype
        self.program, self.store, self.file, self.limit = program, store, file, tokens
        self.float_columns: FloatColumns = float_columns or {}
        self.kept: dict[str, Columns] = {}
        self.method = MethodBuilder(name)
        self.tensors: dict[fx.Node, int] = {}  # nodes' values in the method
        self._local: dict[fx.Node, int] = {}  # nodes' values in the current delegate
        self.graph = XnnpackGraph(file, store)
        self._arguments: list[int] = []  # of the current delegate
        self._rows: dict[str, int] = {}  # the rotary tables' rows, values of the method
        self._given_rows: dict[str, int] = {}  # the same rows, values of the current delegate
        self.windows: dict[int, Window] = {}
        # What emits, in the current delegate, a node that kernels before it only prepared.
        self.deferred: dict[fx.Node, Callable[[], int]] = {}
        self.scored: dict[fx.Node, Scored] = {}
        self.repeated_masks: dict[tuple[int, int], int] = {}  # by mask and groups of heads
        self._recent: dict[fx.Node, int] = {}  # the states of convolutions, values of the method
        self._begun: int | None = None  # whether the text began before this run, likewise
        self._at_start: int | None = None  # whether it begins with this run, likewise
        self._remembered: list[tuple[int, fx.Node]] = []  # of the current delegate
        # Which experts of a mixture any token chose: a tensor for each number of experts, and the
        # tensors that are its elements.
        self.used: dict[int, tuple[int, list[int]]] = {}
        # The rows of experts' slots, by the node of the tokens' weights of experts.
        self.slot_rows: dict[fx.Node, int] = {}
        # Embeddings whose kernel returns the columns of each pair exchanged.
        self.exchanged: set[fx.Node] = set()

    def begin(self) -> None:
        """Emits the method's inputs, and the rotary tables' rows for the tokens' positions."""
        method = self.method
        self.ids = method.input("int64", [1, self.limit], dynamic=True)
        self.position = method.input("int64", [1], dynamic=False)
        self.start, self.end = method.computed_integer(), method.computed_integer()
        self.count, one = method.computed_integer(), method.integer(1)
        method.call("aten::sym_size", "int", self.ids, one, self.count)
        method.call("aten::_local_scalar_dense", "", self.position, self.start)
        method.call("executorch_prim::add", "Scalar", self.start, self.count, self.end)
        for node, given in self.program.placeholders("table"):
            if not node.users:
                continue
            values = self.program.tables[given.name]
            whole = self.table(given.name, values.numpy().tobytes(), list(values.shape))
            rows = method.tensor("float32", [self.limit, values.shape[1]], dynamic=True)
            self.slice(whole, 0, self.start, self.end, rows)
            self._rows[given.name] = rows

    def dims(self, node: fx.Node) -> list[int]:
        """A node's shape for the largest number of tokens."""
        most = min(self.limit, node.meta.get("positions", self.limit))
        return [most if dim == -1 else dim for dim in shape_of(node)]

    def is_dynamic(self, node: fx.Node) -> bool:
        """Whether a node's shape depends on the number of tokens."""
        return -1 in shape_of(node)

    def table(self, key: str, data: bytes, shape: list[int]) -> int:
        """Adds a float32 constant that is not a weight, under a key that describes it."""
        return self.method.constant("float32", shape, self.file.constant(key, Blob(data)), key)

    def weight_table(self, key: str, blob: Blob, dtype: ScalarType, shape: Sequence[int]) -> int:
        """Adds a weight, or a part of one, that a kernel reads."""
        buffer = self.file.table(key, blob, dtype, shape)
        return self.method.constant(dtype, shape, buffer, key)

    def shares_head(self, node: fx.Node) -> bool:
        """Whether an embedding's table and the head's matrix share the same bytes of the .ptd."""
        if self.file.weights is None:
            return False
        table = node_argument(node, 1)
        # `XnnpackGraph.exact_linear` stores a small head with groups as one matrix for each group,
        # which the embedding's kernel cannot read.
        return any(
            user.target is dialect.QUANT_LINEAR
            and (
                QuantizedCall.of(user).integers.group_size is None
                or kept_columns(self, user) != ALL
            )
            for user in table.users
        )

    def slice(self, source: int, axis: int, start: int, end: int, out: int) -> None:
        """Emits a copy of ``source[start:end]`` along an axis; the bounds are method values."""
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
        self._given_rows, self._remembered = {}, []

    def hold(self, node: fx.Node, value: int) -> None:
        """Records the current delegate's value that holds a node's result."""
        self._local[node] = value

    def end_delegate(self, nodes: Sequence[fx.Node], output: fx.Node) -> None:
        """Emits the delegate; its results that later stages need become tensors of the method."""
        inside = set(nodes)
        for node in nodes:
            leaves = node is output or any(
                user not in inside and user.target is not dialect.SIZE for user in node.users
            )
            if node in self._local and leaves:
                self.tensors[node] = self.leave(self._local[node], dynamic=self.is_dynamic(node))
        rows = [self.leave(value, dynamic=True) for value, _ in self._remembered]
        self.run_delegate()
        for row, (_, recent) in zip(rows, self._remembered, strict=True):
            tokens = shape_of(recent)[2]
            ends = self.method.integer(-tokens), self.method.integer(LAST_INDEX)
            self.slice(row, 1, *ends, self._recent[recent])

    def leave(self, value: int, *, dynamic: bool) -> int:
        """Makes a value of the current delegate a tensor of the method; call it after all inputs.

        Args:
            value: the delegate's value.
            dynamic: whether its shape depends on the number of tokens.
        """
        self.graph.output(value)
        made = self.method.tensor("float32", self.graph.dims(value), dynamic=dynamic)
        self._arguments.append(made)
        return made

    def run_delegate(self) -> None:
        """Emits the call of the current delegate."""
        self.method.delegate(self.file.payload(self.graph.encode()), self._arguments)

    def given(self, tensor: int, dims: Sequence[int]) -> int:
        """Makes a float32 tensor of the method an input of the current delegate."""
        value = self.graph.input(dims)
        self._arguments.append(tensor)
        return value

    def recent(self, node: fx.Node) -> int:
        """The tokens before these that a convolution reads, in the current delegate.

        Args:
            node: the placeholder of the state, ``float32[1, columns, tokens]``.

        Returns:
            ``float32[1, tokens, columns]``; zeros at position 0.
        """
        method, (_, columns, tokens) = self.method, shape_of(node)
        dims = [1, tokens, columns]
        held = self._recent[node] = method.state("float32", dims)
        if self._begun is None:
            self._begun = method.tensor("bool", [1], dynamic=False)
            zero = method.integer(0)
            method.call("aten::gt", "Scalar_out", self.position, zero, out=self._begun)
        nothing = self.table("nothing", np.zeros(1, np.float32).tobytes(), [1])
        before = method.tensor("float32", dims, dynamic=False)
        method.call("aten::where", "self_out", self._begun, held, nothing, out=before)
        return self.given(before, dims)

    def at_start(self) -> int:
        """The boolean whether the text begins with this run: whether the position is 0."""
        if self._at_start is None:
            self._at_start, zero = self.method.computed_boolean(), self.method.integer(0)
            equal = "executorch_prim::eq", "Scalar"
            self.method.call(*equal, self.start, zero, self._at_start)
        return self._at_start

    def remember(self, row: int, node: fx.Node) -> None:
        """After the current delegate, a state takes the last tokens of one of its values."""
        self._remembered.append((row, node))

    def value(self, node: fx.Node) -> int:
        """A node's value in the current delegate; a result from before it becomes an input."""
        if node in self.deferred and node not in self._local:
            self._local[node] = self.deferred[node]()
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
        """Emits the exchange of the two columns of each pair."""
        graph, width = self.graph, self.graph.dims(source)[-1]
        pairs = graph.reshape(source, [1, -1, width // 2, 2])
        turned = graph.concatenate([graph.columns(pairs, 1, 2), graph.columns(pairs, 0, 1)])
        return graph.reshape(turned, [1, -1, width])

    def outer_dims(self, node: fx.Node) -> list[int]:
        """The shape of a node's tensor in the method; attention's has a dimension for the heads."""
        source, dims = origin(node), self.dims(node)
        if source.target is dialect.ATTENTION:
            return [*dims[:2], *self.dims(node_argument(source, 0))[2:]]
        return dims

    def outer_dtype(self, node: fx.Node) -> ScalarType:
        """The dtype of a node's tensor in the method; rows of a float16 table are float16."""
        source = origin(node)
        return self.table_dtype(source) if source.target is dialect.EMBEDDING else "float32"

    def rows(self, name: str, width: int) -> int:
        """A rotary table's rows for these tokens in the current delegate: ``[1, t, 1, width]``."""
        if name not in self._given_rows:
            given = self.given(self._rows[name], [self.limit, width])
            self._given_rows[name] = self.graph.reshape(given, [1, -1, 1, width])
        return self._given_rows[name]

    def weight_name(self, node: fx.Node, index: int) -> str:
        """The name of the weight that an argument is a part of."""
        return self.program.inputs[node_argument(node, index).name].name

    def table_dtype(self, node: fx.Node) -> ScalarType:
        """The dtype of a float embedding's table in the file."""
        extent = self.store.extents(self.weight_name(node, 1))["value"]
        return "float16" if extent.dtype == "F16" else "float32"


def kept_columns(state: MethodLowering, node: fx.Node) -> Columns:
    """The columns whose activations a product with an integer weight keeps float32; see `SMALL`."""
    call = QuantizedCall.of(node)
    source, (rows, columns) = call.source, call.shape
    if source.target is dialect.ROUND_PER_TOKEN:
        return ()
    if rows * columns <= SMALL and (source.target is dialect.MUL or node is head_of(state.program)):
        return ALL
    return state.float_columns.get(state.weight_name(node, 1), ())
