"""Walks a program and emits one method: delegates, and the kernels between them.

XNNPACK computes everything except embeddings, attention, the choice of experts and the selection of
the last token. ExecuTorch's own kernels compute attention and hold its caches, so that a delegate
ends before every attention and the next delegate begins after it. So it does around a recurrence,
which is a loop over tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from torch import fx

from exporters.executorch.attention import attention
from exporters.executorch.delegates import emit
from exporters.executorch.lookups import embedding, last, quant_embedding
from exporters.executorch.method import MethodBuilder
from exporters.executorch.mixtures import gather
from exporters.executorch.recurrence import recurrence
from exporters.executorch.routes import route, route_sparse_mixer
from exporters.executorch.state import MethodLowering
from quant.program import dialect
from quant.program.expert_branches import mixtures
from quant.program.program import Program

_KERNELS: Final[dict[object, Callable[[MethodLowering, fx.Node], None]]] = {
    dialect.EMBEDDING: embedding,
    dialect.QUANT_EMBEDDING: quant_embedding,
    dialect.ATTENTION: attention,
    dialect.RECURRENCE: recurrence,
    dialect.LAST: last,
    dialect.ROUTE: route,
    dialect.ROUTE_SPARSE_MIXER: route_sparse_mixer,
    dialect.COMBINE: gather,
    dialect.SLOTS: gather,
}


@dataclass
class _Stage:
    """A delegate, and the kernels that run after it.

    Attributes:
        nodes: the delegate's nodes, in order.
        kernels: the nodes whose kernels run after it.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    kernels: list[fx.Node] = field(default_factory=list)


def stages_of(program: Program) -> list[_Stage]:
    """Sorts a program's nodes into delegates and the kernels between them.

    A delegate's node goes into the first delegate at which all of its inputs are available. A
    kernel runs right after the delegate that computes the last of its inputs. Experts of a mixture
    have delegates of their own, which `exporters.executorch.mixtures` emits.
    """
    stage: dict[fx.Node, int] = {}
    found: list[_Stage] = []
    mixed = mixtures(program)
    apart = {
        node
        for mixture in mixed.values()
        for branch in mixture.branches
        for node in (branch.chosen, *branch.nodes)
    }
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is dialect.SIZE or node in apart:
            continue
        inputs = (
            [mixed[node].source, mixed[node].weights] if node in mixed else node.all_input_nodes
        )
        sources = [source for source in inputs if source in stage]
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


def lower_method(state: MethodLowering) -> MethodBuilder:
    """Emits a whole method: for each stage the delegate, then the kernels after it.

    Raises:
        ExportError: a node has no handler.
    """
    state.begin()
    output = state.program.output()
    for stage in stages_of(state.program):
        if stage.nodes:
            _lower_delegate(state, stage, output)
        for node in stage.kernels:
            _KERNELS[node.target](state, node)
    state.method.output(state.tensors[output])
    return state.method


def _lower_delegate(state: MethodLowering, stage: _Stage, output: fx.Node) -> None:
    state.begin_delegate()
    emit(state, stage.nodes)
    state.end_delegate(stage.nodes, output)
