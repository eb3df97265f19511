"""The state of a walk that emits ONNX nodes: what handlers read and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from exporters.onnx.attention import AttentionPattern
from exporters.onnx.graph import GraphBuilder
from quant.program.program import Program, node_argument
from quant.store.store import WeightStore

if TYPE_CHECKING:
    from exporters.target import CacheRanges


@dataclass
class Lowering:
    """One graph being lowered.

    Attributes:
        program: in the lowered dialect.
        store: the weights it names.
        builder: the graph so far.
        attention: the patterns around each attention node.
        absorbed: nodes that a pattern emits, by whom nothing else is to be done.
        caches: inputs and outputs made for the caches, in the order of the layers.
        cache_ranges: how far caches of int8 reach; empty for float32.
    """

    program: Program
    store: WeightStore
    builder: GraphBuilder
    attention: dict[fx.Node, AttentionPattern] = field(default_factory=dict)
    absorbed: set[fx.Node] = field(default_factory=set)
    names: dict[fx.Node, str] = field(default_factory=dict)
    caches: list[tuple[str, str, tuple[int, int]]] = field(default_factory=list)
    cache_ranges: CacheRanges = field(default_factory=dict)

    def name(self, node: fx.Node) -> str:
        """The ONNX value that holds a node's result."""
        return self.names.setdefault(node, node.name)

    def operand(self, node: fx.Node, index: int) -> str:
        """The ONNX value of one of a node's arguments."""
        return self.name(node_argument(node, index))
