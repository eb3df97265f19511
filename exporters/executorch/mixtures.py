"""Emits the experts of a mixture: a delegate each, which runs only where a token chose the expert.

For each expert the method jumps past these calls when no token of the run chose it::

    column = select_copy(weights, 2, expert)              # float32[1, t]
    which = select_copy(nonzero(column), 1, 1)            # int64[n]
    chosen = index_select(x, 1, which)                    # float32[1, n, i]
    factor = index_select(column, 1, which)               # float32[1, n]
    old = index_select(sum, 1, which)                     # float32[1, n, o]
    new = delegate(chosen, factor, old)                   # old + factor * expert(chosen)
    sum[:, which] = new

A jump's condition is a tensor of one boolean. ``gt(amax(weights), 0)`` computes those of all
experts at once, and each condition is an element of its result in place, so that a jump costs no
kernel.

The tensors within are the same for all experts of a layer: kernels and delegates resize them at
each run. So a layer has as many tensors as one expert needs, and the memory of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from exporters.errors import ExportError
from exporters.executorch.delegates import emit
from exporters.executorch.state import MethodLowering
from quant.program.expert_branches import Branch, Mixture, mixture_of


def combine(state: MethodLowering, node: fx.Node) -> None:
    """Emits a layer's experts, and the sum of what they compute times the tokens' weights.

    Raises:
        ExportError: the experts' results have another width than their inputs.
    """
    mixture = mixture_of(node)
    method, weights = state.method, state.tensors[mixture.weights]
    source, dims = state.tensors[mixture.source], state.dims(node)
    if state.dims(mixture.source) != dims:
        raise ExportError(
            f"the experts that {node.name} adds up give another width than they take, which the "
            f"ExecuTorch target has no kernels for"
        )
    total = method.tensor("float32", dims, dynamic=True)
    method.call("aten::full_like", "out", source, method.double(0.0), method.none(), out=total)
    state.tensors[node] = total
    conditions = _conditions(state, weights, state.dims(mixture.weights)[-1])
    shared = _Shared.of(state, mixture, total)
    for branch in mixture.branches:
        land = method.jump(conditions[branch.expert])
        _expert(state, branch, shared)
        land()


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


@dataclass(frozen=True)
class _Shared:
    """The method's tensors that all experts of a layer use.

    Attributes:
        source: what the experts read, of all tokens.
        weights: each token's weight of each expert.
        total: the sum of the experts' results so far.
        dims: the shape of the chosen tokens at their largest number.
        column: all tokens' weights of the expert, ``float32[1, t]``.
        found: the places of the weights that are not zero, ``int64[n, 2]``.
        which: the tokens that chose the expert, ``int64[n]``.
        places: the list by which ``index_put_`` finds their rows.
        chosen: those tokens, ``float32[1, n, i]``.
        factor: their weights, ``float32[1, n]``.
        old: their rows of the sum.
        new: the same with the expert's results.
    """

    source: int
    weights: int
    total: int
    dims: tuple[int, ...]
    column: int
    found: int
    which: int
    places: int
    chosen: int
    factor: int
    old: int
    new: int

    @classmethod
    def of(cls, state: MethodLowering, mixture: Mixture, total: int) -> _Shared:
        method, dims = state.method, tuple(state.dims(mixture.source))
        tokens = dims[1]
        column, factor = (method.tensor("float32", [1, tokens], dynamic=True) for _ in range(2))
        found, which = (method.tensor("int64", [tokens, *more], dynamic=True) for more in ([2], []))
        chosen, old, new = (method.tensor("float32", dims, dynamic=True) for _ in range(3))
        return cls(
            state.tensors[mixture.source],
            state.tensors[mixture.weights],
            total,
            dims,
            column,
            found,
            which,
            method.optional_tensors([None, which]),
            chosen,
            factor,
            old,
            new,
        )


def _expert(state: MethodLowering, branch: Branch, shared: _Shared) -> None:
    method = state.method
    integer, no = method.integer, method.boolean(False)

    def select(source: int, axis: int, index: int, out: int) -> None:
        method.call("aten::select_copy", "int_out", source, integer(axis), integer(index), out=out)

    def gather(source: int, out: int) -> None:
        method.call("aten::index_select", "out", source, integer(1), shared.which, out=out)

    select(shared.weights, 2, branch.expert, shared.column)
    method.call("aten::nonzero", "out", shared.column, out=shared.found)
    select(shared.found, 1, 1, shared.which)
    gather(shared.source, shared.chosen)
    gather(shared.column, shared.factor)
    gather(shared.total, shared.old)
    _delegate(state, branch, shared)
    total = shared.total
    method.call("aten::index_put_", "", total, shared.places, shared.new, no, total)


def _delegate(state: MethodLowering, branch: Branch, shared: _Shared) -> None:
    """Emits the expert's delegate: ``new = old + factor * expert(chosen)``."""
    key = state.weight_name(branch.result, 1), shared.dims
    experts = state.file.experts
    if key not in experts:
        experts[key] = _segment(state, branch, shared)
    arguments = shared.chosen, shared.old, shared.factor, shared.new
    state.method.delegate(experts[key], arguments)


def _segment(state: MethodLowering, branch: Branch, shared: _Shared) -> int:
    """Writes the program of the expert's delegate; returns the number of its segment."""
    state.begin_delegate()
    graph = state.graph
    chosen, old = graph.input(shared.dims), graph.input(shared.dims)
    factor = graph.reshape(graph.input([1, shared.dims[1]]), [1, -1, 1])
    state.hold(branch.chosen, chosen)
    emit(state, branch.nodes)
    result = graph.binary("XNNMultiply", state.value(branch.result), factor)
    graph.output(graph.binary("XNNAdd", old, result))
    return state.file.payload(graph.encode())
