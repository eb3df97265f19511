"""Where a linear's input columns can be rescaled for nothing.

If columns of ``W`` are multiplied by ``s``, what enters them must be divided by ``s``. That costs
nothing at run time where what enters is made by parameters that can be divided instead:

- a norm's scale, when the linear alone reads the norm;
- rows of the linear before it, when only steps that commute with a factor lie between: attention's
  values, and the factor of a gated product that goes through no activation function.

The places are found in the graph, so a family needs to name none.
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
    """What can be divided in the place of a linear's inputs.

    Attributes:
        weight: the norm's or the linear's weight.
        rows: int64 ``[columns]``: for each input column, the element of the norm's scale, or the
            row of the linear's weight, that makes it. Columns of one row take one factor.
        is_norm: whether it is a norm.
    """

    weight: str
    rows: torch.Tensor
    is_norm: bool


def foldable(program: Program) -> Mapping[str, Fold]:
    """The folds of a program in the float dialect, by the linear's weight.

    A weight that several calls read, such as a tied head, has none.
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
            repeated = columns.expand(kv_heads, heads // kv_heads, width).reshape(-1)
            return split_linear(program, node_argument(value, 0), repeated)
    return None


def split_linear(program: Program, part: fx.Node, columns: torch.Tensor | None) -> Fold | None:
    """The fold into a part of a linear's output, of which ``columns`` are taken in order."""
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
