"""Emits the experts of a mixture: a delegate each, which runs only where a token chose the expert.

For each expert the method jumps past these calls when no token of the run chose it::

    column = select_copy(weights, 2, expert)              # float32[1, t]
    which = select_copy(nonzero(column), 1, 1)            # int64[n]
    chosen = index_select(x, 1, which)                    # float32[1, n, i]
    factor = index_select(column, 1, which)               # float32[1, n]
    old = index_select(sum, 1, which)                     # float32[1, n, o]
    new = delegate(chosen, old, factor)                   # old + factor * expert(chosen)
    sum[:, which] = new

In a mixture of attention heads, each token has rows for its experts (`exporters.executorch.slots`).
Those of an expert are::

    own = index_select(select_copy(rows, 1, expert), 0, which)    # int64[n]

An expert of the queries gives ``slots[:, own] = delegate(chosen)``, and one of the outputs reads
``chosen = index_select(slots, 1, own)``.

A jump's condition is a tensor of one boolean. ``gt(amax(weights), 0)`` computes those of all
experts at once, and each condition is an element of its result in place, so that a jump costs no
kernel.

The tensors within are the same for all experts of a layer: kernels and delegates resize them at
each run. So a layer has as many tensors as one expert needs, and the memory of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from exporters.errors import ExportError
from exporters.executorch.delegates import emit
from exporters.executorch.method import ScalarType
from exporters.executorch.slots import give_heads, row_numbers, slots_first, zeros
from exporters.executorch.state import MethodLowering
from quant.program.expert_branches import Branch, Mixture, mixture_of


def gather(state: MethodLowering, node: fx.Node) -> None:
    """Emits a mixture's experts, and what gathers their results.

    That is the sum of the results times the tokens' weights, or the results side by side.

    Raises:
        ExportError: a feed-forward part's experts give another width than they take.
    """
    mixture = mixture_of(node)
    weights = state.tensors[mixture.weights]
    experts = _Experts(state, mixture)
    conditions = _conditions(state, weights, state.dims(mixture.weights)[-1])
    for branch in mixture.branches:
        land = state.method.jump(conditions[branch.expert])
        experts.emit(branch)
        land()
    if mixture.fills_slots:
        give_heads(state, node, experts.made, mixture)
    else:
        state.tensors[node] = experts.made


def _conditions(state: MethodLowering, weights: int, experts: int) -> list[int]:
    """For each expert whether any token chose it, as a tensor ``bool[1]``."""
    method = state.method
    most = method.tensor("float32", [experts], dynamic=False)
    outer, no = method.integers([0, 1]), method.boolean(False)
    method.call("aten::amax", "out", weights, outer, no, out=most)
    if experts not in state.used:
        used = method.tensor("bool", [experts], dynamic=False)
        state.used[experts] = used, method.elements(used, "bool", experts)
    used, conditions = state.used[experts]
    method.call("aten::gt", "Scalar_out", most, method.double(0.0), out=used)
    return conditions


class _Experts:
    """The experts of one mixture.

    Args:
        state: the method; it gets what is computed once for all experts.
        mixture: the mixture.

    Attributes:
        made: what gathers their results: a row for each token, or for each of its slots.
    """

    def __init__(self, state: MethodLowering, mixture: Mixture) -> None:
        self.state, self.method, self.mixture = state, state.method, mixture
        self.weights, self.tokens = state.tensors[mixture.weights], state.dims(mixture.weights)[1]
        first = mixture.branches[0]
        self.dims = tuple(state.dims(first.chosen))
        self.new_dims = tuple(state.dims(first.result))
        if mixture.reads_slots:
            self.source = slots_first(state, mixture)
        else:
            self.source = state.tensors[mixture.source]
        self.rows = row_numbers(state, mixture) if mixture.slots != (0, 0) else None
        self.made = self._zeros()
        self._shared: dict[str, int] = {}

    def _zeros(self) -> int:
        """What results are added to, or placed in."""
        state, method, node = self.state, self.method, self.mixture.combine
        if self.rows is not None:
            return zeros(state, self.mixture, self.new_dims[2])
        if self.dims != self.new_dims:
            raise ExportError(
                f"the experts that {node.name} adds up give another width than they take, which "
                f"the ExecuTorch target has no kernels for"
            )
        made = method.tensor("float32", state.dims(node), dynamic=True)
        absent = method.none()
        method.call("aten::full_like", "out", self.source, method.double(0.0), absent, out=made)
        return made

    def emit(self, branch: Branch) -> None:
        """Emits the calls of one expert."""
        method, mixture, tokens = self.method, self.mixture, self.tokens
        column = self._shared_tensor("column", "float32", [1, tokens])
        found = self._shared_tensor("found", "int64", [tokens, 2])
        which = own = self._shared_tensor("which", "int64", [tokens])
        self._select(self.weights, 2, branch.expert, column)
        method.call("aten::nonzero", "out", column, out=found)
        self._select(found, 1, 1, which)
        if self.rows is not None:
            of_expert = self._shared_tensor("rows", "int64", [tokens])
            own = self._shared_tensor("own", "int64", [tokens])
            self._select(self.rows, 1, branch.expert, of_expert)
            self._index(of_expert, 0, which, own)
        chosen = self._shared_tensor("chosen", "float32", self.dims)
        new = self._shared_tensor("new", "float32", self.new_dims)
        self._index(self.source, 1, own if mixture.reads_slots else which, chosen)
        if mixture.fills_slots:
            self._delegate(branch, chosen, new)
            self._put(own, new)
            return
        factor = self._shared_tensor("factor", "float32", [1, tokens])
        old = self._shared_tensor("old", "float32", self.new_dims)
        self._index(column, 1, which, factor)
        self._index(self.made, 1, which, old)
        self._delegate(branch, chosen, old, factor, new)
        self._put(which, new)

    def _shared_tensor(self, name: str, dtype: ScalarType, dims: Sequence[int]) -> int:
        """A tensor that all experts use."""
        if name not in self._shared:
            self._shared[name] = self.method.tensor(dtype, dims, dynamic=True)
        return self._shared[name]

    def _select(self, source: int, axis: int, index: int, out: int) -> None:
        method, where = self.method, (self.method.integer(axis), self.method.integer(index))
        method.call("aten::select_copy", "int_out", source, *where, out=out)

    def _index(self, source: int, axis: int, which: int, out: int) -> None:
        method = self.method
        method.call("aten::index_select", "out", source, method.integer(axis), which, out=out)

    def _put(self, where: int, new: int) -> None:
        """Replaces rows of what gathers the results."""
        method = self.method
        if "places" not in self._shared:
            self._shared["places"] = method.optional_tensors([None, where])
        places, no = self._shared["places"], method.boolean(False)
        method.call("aten::index_put_", "", self.made, places, new, no, self.made)

    def _delegate(self, branch: Branch, *arguments: int) -> None:
        """Emits the expert's delegate, whose program all methods share."""
        key = self.state.weight_name(branch.result, 1), self.dims
        experts = self.state.file.experts
        if key not in experts:
            experts[key] = self._segment(branch)
        self.method.delegate(experts[key], arguments)

    def _segment(self, branch: Branch) -> int:
        """Writes the program of an expert's delegate; returns the number of its segment."""
        state = self.state
        state.begin_delegate()
        graph = state.graph
        state.hold(branch.chosen, graph.input(self.dims))
        if self.mixture.fills_slots:
            emit(state, branch.nodes)
            graph.output(state.value(branch.result))
            return state.file.payload(graph.encode())
        old = graph.input(self.new_dims)
        factor = graph.reshape(graph.input([1, self.dims[1]]), [1, -1, 1])
        emit(state, branch.nodes)
        result = graph.binary("XNNMultiply", state.value(branch.result), factor)
        graph.output(graph.binary("XNNAdd", old, result))
        return state.file.payload(graph.encode())
