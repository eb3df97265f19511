"""Finds where a linear's input columns can be rescaled at no cost at run time.

If columns of ``W`` are multiplied by ``s``, their inputs must be divided by ``s``. That costs
nothing at run time where parameters that produce the inputs can be divided instead:

- a norm's scale, when only linears read the norm; they then share the factors. LayerNorm's shift
  is divided together with its scale;
- rows of the linear before it, when only steps that commute with a factor lie between: attention's
  values, and a factor of a gated product that passes through no activation function. The linear's
  bias is divided together with its rows. A bound does not commute, so there is no place before it.

The code finds these places in the graph, so a family need not name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from quant.program.calls import GetCall, LayerNormCall, SplitCall
from quant.program.dialect import (
    ATTENTION,
    BIAS,
    GELU,
    GET,
    LAYER_NORM,
    LINEAR,
    MUL,
    RMS_NORM,
    SILU,
    SPLIT,
    VIEW,
)
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
        sharers: names of the linears' weights that read this norm, in the program's order; their
            columns must take the same factors. One name where the fold is not a norm's.
        added: the name of the vector whose elements ``rows`` are divided too: the norm's shift or
            the bias of the linear before; None where there is none.
    """

    weight: str
    rows: torch.Tensor
    is_norm: bool
    sharers: tuple[str, ...]
    added: str | None = None


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
            if fold is not None:
                added = () if fold.added is None else (fold.added,)
                if all(readers[each] == 1 for each in (fold.weight, *fold.sharers, *added)):
                    found[name] = fold
    return found


def _before(program: Program, linear: fx.Node) -> Fold | None:
    entering, own = node_argument(linear, 0), _weight(program, linear)
    if entering.target in (RMS_NORM, LAYER_NORM):
        return _norm_before(program, entering)
    if len(entering.users) != 1:
        return None
    if entering.target is MUL:
        factors = [node_argument(entering, 0), node_argument(entering, 1)]
        plain = [factor for factor in factors if factor.target not in (SILU, GELU)]
        # Where both factors are plain, as in a gated convolution, one of them is enough.
        folds = (linear_before(program, factor, None, own) for factor in plain)
        return next((fold for fold in folds if fold is not None), None)
    if entering.target is ATTENTION:
        query, value = node_argument(entering, 0), node_argument(entering, 2)
        if value.target is VIEW and len(value.users) == 1:
            _, _, kv_heads, width = value.meta["val"].shape
            heads = query.meta["val"].shape[2]
            columns = torch.arange(kv_heads * width).reshape(kv_heads, 1, width)
            # Grouped queries: several query heads read the same value head.
            repeated = columns.expand(kv_heads, heads // kv_heads, width).reshape(-1)
            return linear_before(program, node_argument(value, 0), repeated, own)
    return None


def _norm_before(program: Program, norm: fx.Node) -> Fold | None:
    """The fold into a norm's scale; None where it has none, or others than linears read it."""
    added = None
    if norm.target is LAYER_NORM:
        call = LayerNormCall.of(norm)
        if call.weight is None:
            return None
        added = None if call.bias is None else program.inputs[call.bias.name].name
    if not all(user.target is LINEAR for user in norm.users):
        return None
    columns = torch.arange(norm.meta["val"].shape[-1])
    sharers = tuple(_weight(program, user) for user in norm.users)
    return Fold(_weight(program, norm), columns, is_norm=True, sharers=sharers, added=added)


def linear_before(
    program: Program, part: fx.Node, columns: torch.Tensor | None, reader: str
) -> Fold | None:
    """Returns the fold into a linear's output or a part of it, or None where there is none.

    Args:
        program: the program in the float dialect.
        part: the node that is read: a linear, or one part of a linear's split output.
        columns: int64 ``[columns]``, the element of the part that each input column comes from;
            None when the columns are the part's elements in order.
        reader: the name of the weight whose columns are rescaled.
    """
    if len(part.users) != 1:
        return None
    first, width, linear = 0, part.meta["val"].shape[-1], part
    if part.target is GET:
        taken = GetCall.of(part)
        if taken.split.target is not SPLIT:
            return None
        whole = SplitCall.of(taken.split)
        first, linear = sum(whole.sizes[: taken.index]), whole.x
    added = None
    if linear.target is BIAS and len(linear.users) == 1:
        added, linear = _weight(program, linear), node_argument(linear, 0)
    if linear.target is not LINEAR or len(linear.users) != 1:
        return None
    rows = first + (torch.arange(width) if columns is None else columns)
    return Fold(_weight(program, linear), rows, is_norm=False, sharers=(reader,), added=added)


def _weight(program: Program, node: fx.Node) -> str:
    """Returns the name of the weight that a linear or a norm reads."""
    return program.inputs[node_argument(node, 1).name].name
