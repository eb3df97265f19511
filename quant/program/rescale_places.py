"""Finds where a linear's input columns can be rescaled at no cost at run time.

If columns of ``W`` are multiplied by ``s``, their inputs must be divided by ``s``. That costs
nothing at run time where parameters that produce the inputs can be divided instead:

- a norm's scale, when only this linear reads the norm;
- rows of the linear before it, when only steps that commute with a factor lie between: attention's
  values, and the factor of a gated product that passes through no activation function.

The code finds these places in the graph, so a family need not name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from quant.program.calls import GetCall, SplitCall
from quant.program.dialect import ATTENTION, GET, LINEAR, MUL, RMS_NORM, SILU, SPLIT, VIEW
from quant.program.program import Program, node_argument


@dataclass(frozen=True)
class Fold:
    """The parameters that can be divided instead of a linear's inputs.

    Attributes:
        weight: the name of the weight to divide: a norm's scale or the weight of a linear before.
        rows: int64 ``[columns]``: for each input column, the element of the norm's scale, or the
            row of the linear's weight, that produces it. Columns of the same row must take the
            same factor.
        is_norm: whether the weight is a norm's scale.
    """

    weight: str
    rows: torch.Tensor
    is_norm: bool


def foldable(program: Program) -> Mapping[str, Fold]:
    """Returns the folds of a program in the float dialect, by the name of the linear's weight.

    A weight that several calls read, such as a tied head, has no fold.
    """
    found: dict[str, Fold] = {}
    readers: dict[str, int] = {}
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source.op == "placeholder" and program.inputs[source.name].kind == "weight":
                name = program.inputs[source.name].name
                readers[name] = readers.get(name, 0) + 1
    for node in program.graph.nodes:
        if node.target is LINEAR:
            fold = _before(program, node)
            name = program.inputs[node_argument(node, 1).name].name
            if fold is not None and readers[name] == readers[fold.weight] == 1:
                found[name] = fold
    return found


def _before(program: Program, linear: fx.Node) -> Fold | None:
    entering = node_argument(linear, 0)
    if len(entering.users) != 1:
        return None
    if entering.target is RMS_NORM:
        name = program.inputs[node_argument(entering, 1).name].name
        return Fold(name, torch.arange(entering.meta["val"].shape[-1]), is_norm=True)
    if entering.target is MUL:
        factors = [node_argument(entering, 0), node_argument(entering, 1)]
        plain = [factor for factor in factors if factor.target is not SILU]
        if len(plain) == 1:
            return split_linear(program, plain[0], None)
    if entering.target is ATTENTION:
        query, value = node_argument(entering, 0), node_argument(entering, 2)
        if value.target is VIEW and len(value.users) == 1:
            _, _, kv_heads, width = value.meta["val"].shape
            heads = query.meta["val"].shape[2]
            columns = torch.arange(kv_heads * width).reshape(kv_heads, 1, width)
            # Grouped queries: several query heads read the same value head.
            repeated = columns.expand(kv_heads, heads // kv_heads, width).reshape(-1)
            return split_linear(program, node_argument(value, 0), repeated)
    return None


def split_linear(program: Program, part: fx.Node, columns: torch.Tensor | None) -> Fold | None:
    """Returns the fold into a part of a linear's split output, or None where there is none.

    Args:
        program: the program in the float dialect.
        part: the node that is read: one part of a split.
        columns: int64 ``[columns]``, the element of the part that each input column comes from;
            None when the columns are the part's elements in order.
    """
    if part.target is not GET or len(part.users) != 1:
        return None
    taken_part = GetCall.of(part)
    if taken_part.split.target is not SPLIT:
        return None
    whole, index = SplitCall.of(taken_part.split), taken_part.index
    linear, widths = whole.x, whole.sizes
    if linear.target is not LINEAR or len(linear.users) != 1:
        return None
    taken = torch.arange(widths[index]) if columns is None else columns
    name = program.inputs[node_argument(linear, 1).name].name
    return Fold(name, sum(widths[:index]) + taken, is_norm=False)
