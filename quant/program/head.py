"""The product that gives a program's logits; some families change them further."""

from __future__ import annotations

from torch import fx

from quant.program.dialect import ELEMENTWISE
from quant.program.program import Program, node_argument


def head_of(program: Program) -> fx.Node:
    """Returns the head: the product that gives the logits, before its bias, a factor or a softcap.

    In most families it is the program's output itself.
    """
    node = program.output()
    while node.target in ELEMENTWISE:
        node = node_argument(node, 0)
    return node
