"""Typed views give the arguments that the operators' own schemas name."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from quant.formats.formats import IntFormat, PaletteFormat
from quant.program import dialect
from quant.program.calls import (
    AttentionCall,
    FactorCall,
    GetCall,
    LayerNormCall,
    NormCall,
    QuantizedCall,
    ShortConvCall,
    SplitCall,
)


@pytest.fixture
def graph():
    return fx.Graph()


def inputs(graph: fx.Graph, *names: str) -> list[fx.Node]:
    return [graph.placeholder(name) for name in names]


def by_schema(node: fx.Node) -> dict[str, object]:
    """A call's arguments by the names in its operator's schema, which PyTorch keeps."""
    schema = node.target._schema
    return {
        argument.name: value for argument, value in zip(schema.arguments, node.args, strict=True)
    }


def test_attention(graph):
    given = inputs(graph, "q", "k", "v", "k_cache", "v_cache", "position")
    node = graph.call_function(dialect.ATTENTION, (*given, 7, 0.125, 50.0))
    call, named = AttentionCall.of(node), by_schema(node)
    assert (call.q, call.k, call.v) == (named["q"], named["k"], named["v"])
    assert (call.key_cache, call.value_cache) == (named["k_cache"], named["v_cache"])
    assert (call.window, call.scale) == (named["window"], named["scale"]) == (7, 0.125)
    assert call.softcap == named["softcap"] == 50.0


@pytest.mark.parametrize("parts", [(0, 1), (0,), ()])
def test_layer_norms_may_lack_scale_and_shift(graph, parts):
    x, *given = inputs(graph, "x", "weight", "bias")
    weight, bias = (given[i] if i in parts else None for i in (0, 1))
    node = graph.call_function(dialect.LAYER_NORM, (x, weight, bias, 1e-5))
    call, named = LayerNormCall.of(node), by_schema(node)
    assert (call.x, call.weight, call.bias, call.epsilon) == tuple(named.values())


def test_short_convolutions(graph):
    given = inputs(graph, "x", "weight", "recent", "position")
    node = graph.call_function(dialect.SHORT_CONV, tuple(given))
    call, named = ShortConvCall.of(node), by_schema(node)
    assert (call.x, call.weight, call.recent) == tuple(list(named.values())[:3])


@pytest.mark.parametrize("target", [dialect.SCALE, dialect.SOFTCAP, dialect.CLAMP])
def test_what_has_one_number(graph, target):
    (x,) = inputs(graph, "x")
    node = graph.call_function(target, (x, 8.0))
    call = FactorCall.of(node)
    assert (call.x, call.number) == tuple(by_schema(node).values())


@pytest.mark.parametrize("target", [dialect.QUANT_LINEAR, dialect.QUANT_EMBEDDING])
def test_products_and_lookups(graph, target):
    source, codes, scale, zero = inputs(graph, "source", "codes", "scale", "zero")
    codes.meta["val"] = torch.empty(6, 16, dtype=torch.uint8)
    node = graph.call_function(target, (source, codes, scale, zero, "int4-g32-asym"))
    call, named = QuantizedCall.of(node), by_schema(node)
    assert (call.codes, call.scale, call.zero_point) == (
        named["codes"],
        named["scale"],
        named["zero_point"],
    )
    assert call.source is source and call.shape == (6, 32)
    assert isinstance(call.integers, IntFormat) and call.integers.name == named["format"]


def test_a_palette_has_no_zero_point_and_is_no_integer_format(graph):
    source, codes, lut = inputs(graph, "source", "codes", "lut")
    codes.meta["val"] = torch.empty(16, 3, dtype=torch.uint8)
    node = graph.call_function(dialect.QUANT_LINEAR, (source, codes, lut, None, "lut3-gc16"))
    call = QuantizedCall.of(node)
    assert call.zero_point is None and isinstance(call.format, PaletteFormat)
    assert call.shape == (16, 8)
    with pytest.raises(AssertionError):
        _ = call.integers


def test_norms(graph):
    x, weight = inputs(graph, "x", "weight")
    node = graph.call_function(dialect.RMS_NORM, (x, weight, 1e-5))
    call, named = NormCall.of(node), by_schema(node)
    assert (call.x, call.weight, call.epsilon) == (named["x"], named["weight"], named["eps"])


def test_splits_and_their_parts(graph):
    (x,) = inputs(graph, "x")
    split = graph.call_function(dialect.SPLIT, (x, [4, 2, 2], -1))
    part = graph.call_function(dialect.GET, (split, 2))
    assert SplitCall.of(split) == SplitCall(x, (4, 2, 2))
    assert GetCall.of(part) == GetCall(split, 2)
