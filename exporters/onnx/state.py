"""The state that the handlers of operators share while a program is lowered to ONNX nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from exporters.float_columns import Columns, FloatColumns
from exporters.onnx.attention import AttentionPattern
from exporters.onnx.graph import GraphBuilder
from quant.program.expert_branches import Mixture
from quant.program.program import Program, node_argument
from quant.program.states import StateKind
from quant.store.store import WeightStore

if TYPE_CHECKING:
    from exporters.target import CacheRanges


@dataclass(frozen=True)
class LoweredState:
    """A state as a graph takes and returns it.

    Attributes:
        past: the name of the graph's input.
        present: the name of its output.
        kind: what it holds.
        shape: ``(kv_heads, head_dim)`` of a cache ``[batch, kv_heads, length, head_dim]``;
            ``(columns, tokens)`` of recent tokens ``[batch, columns, tokens]``;
            ``(heads, rows, columns)`` of a memory ``[batch, heads, rows, columns]``.
    """

    past: str
    present: str
    kind: StateKind
    shape: tuple[int, ...]


@dataclass
class Lowering:
    """One graph being lowered.

    Attributes:
        program: the program, in the quantized or the lowered dialect.
        store: the store of the weights that the program names.
        builder: the graph so far.
        attention: the pattern around each attention node.
        absorbed: the nodes that a pattern emits; their own handlers are not called.
        names: the ONNX values' names, by node.
        states: what the graph carries from call to call, in the order of the layers.
        cache_ranges: the range of every int8 cache; empty for float32 caches.
        float_columns: the columns whose activations are to stay float32, by weight.
        kept: those that do in this graph.
        mixtures: the mixture of experts of each call that begins a branch or gathers branches.
        in_branches: the calls of experts' branches, whose values are ``[n, columns]``: the n rows
            of the tokens that chose the expert, in place of ``[batch, t, columns]``.
    """

    program: Program
    store: WeightStore
    builder: GraphBuilder
    attention: dict[fx.Node, AttentionPattern] = field(default_factory=dict)
    absorbed: set[fx.Node] = field(default_factory=set)
    names: dict[fx.Node, str] = field(default_factory=dict)
    states: list[LoweredState] = field(default_factory=list)
    cache_ranges: CacheRanges = field(default_factory=dict)
    float_columns: FloatColumns = field(default_factory=dict)
    kept: dict[str, Columns] = field(default_factory=dict)
    mixtures: dict[fx.Node, Mixture] = field(default_factory=dict)
    in_branches: set[fx.Node] = field(default_factory=set)

    def name(self, node: fx.Node) -> str:
        """The name of the ONNX value that holds a node's result."""
        return self.names.setdefault(node, node.name)

    def operand(self, node: fx.Node, index: int) -> str:
        """The name of the ONNX value that holds one of a node's arguments."""
        return self.name(node_argument(node, index))

    def layer_of(self, placeholder: fx.Node) -> int:
        """The number of the layer to which a state belongs."""
        name = self.program.inputs[placeholder.name].name
        found = re.search(r"\.layers\.(\d+)\.", name)
        assert found is not None, f"the state {name} belongs to no layer"
        return int(found[1])
