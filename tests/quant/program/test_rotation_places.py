"""Where rotations fold is read off a program; what they would change is refused by name."""

import pytest
import torch
from torch import fx

from quant.errors import QuantizationError
from quant.program import dialect
from quant.program.program import Input, Program
from quant.program.rotation_places import residual_places, value_places

VOCAB, WIDTH = 6, 4


class Builder:
    """A program around one residual stream."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: dict[str, Input] = {}
        self.tokens = self.placeholder("tokens", "tokens", torch.empty(1, 3, dtype=torch.int64))
        self.table = self.weight("table", VOCAB, WIDTH)
        self.stream = self.call(dialect.EMBEDDING, self.tokens, self.table)

    def placeholder(self, name: str, kind, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        self.inputs[node.name] = Input(kind, name)
        return node

    def weight(self, name: str, *shape: int) -> fx.Node:
        return self.placeholder(name, "weight", torch.empty(shape))

    def call(self, target, *args, width=WIDTH) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta["val"] = torch.empty(1, 3, width)
        return node

    def norm(self, name: str, x: fx.Node | None = None) -> fx.Node:
        return self.call(dialect.RMS_NORM, x or self.stream, self.weight(name, WIDTH), 1e-5)

    def linear(self, name: str, x: fx.Node, width=WIDTH) -> fx.Node:
        return self.call(dialect.LINEAR, x, self.weight(name, width, WIDTH), width=width)

    def block(self) -> None:
        """Adds what a linear makes of what another one makes of the stream."""
        inner = self.call(torch.ops.aten.silu.default, self.linear("in", self.norm("g")))
        self.stream = self.call(dialect.ADD, self.stream, self.linear("out", inner))

    def program(self, output: fx.Node | None = None) -> Program:
        last = output or self.linear("head", self.norm("last"), VOCAB)
        self.graph.output((last,))
        return Program(self.graph, self.inputs, {}, 8, VOCAB)


def test_the_stream_is_followed_from_the_embedding_to_the_head():
    made = Builder()
    made.block()
    places = residual_places(made.program())
    assert places.embedding == "table"
    assert places.readers == {"in": "g", "head": "last"}
    assert places.writers == {"out"}


def test_a_matrix_between_norm_and_tied_head_reads_and_writes():
    made = Builder()
    made.block()
    matrix = made.linear("matrix", made.norm("last"))
    program = made.program(made.call(dialect.LINEAR, matrix, made.table, width=VOCAB))
    places = residual_places(program)
    assert places.readers == {"in": "g", "matrix": "last"}
    assert places.writers == {"out", "matrix"}


def gelu_on_the_stream(made: Builder):
    return made.call(torch.ops.aten.gelu.default, made.stream)


def a_scaled_embedding(made: Builder):
    made.stream = made.call(dialect.MUL, made.stream, made.stream)


def a_norm_read_by_a_product(made: Builder):
    made.call(dialect.MUL, made.norm("g"), made.norm("h"))


def a_sum_with_no_linear(made: Builder):
    inner = made.call(torch.ops.aten.silu.default, made.linear("a", made.norm("h")))
    made.stream = made.call(dialect.ADD, made.stream, inner)


def a_shared_linear(made: Builder):
    shared = made.weight("shared", WIDTH, WIDTH)
    for name in ("g", "h"):
        added = made.call(dialect.LINEAR, made.norm(name), shared)
        made.stream = made.call(dialect.ADD, made.stream, added)


def a_shared_norm(made: Builder):
    scale = made.weight("g", WIDTH)
    for name in ("a", "b"):
        made.linear(name, made.call(dialect.RMS_NORM, made.stream, scale, 1e-5))


def a_second_embedding(made: Builder):
    made.call(dialect.EMBEDDING, made.tokens, made.weight("positions", VOCAB, WIDTH))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (gelu_on_the_stream, r"gelu_default \(aten\.gelu\.default\) reads the residual stream"),
        (a_scaled_embedding, r"mul_tensor \(aten\.mul\.Tensor\) reads the residual stream"),
        (a_norm_read_by_a_product, r"mul_tensor \(aten\.mul\.Tensor\) reads g and is not a linear"),
        (a_sum_with_no_linear, r"add_tensor_1 adds silu\w* to the stream, but may add only a lin"),
        (a_shared_linear, r"shared is read in 2 places"),
        (a_shared_norm, r"g is read in 2 places"),
        (a_second_embedding, r"embedding_default_1 is a second embedding"),
    ],
)
def test_what_a_rotation_would_change_is_refused_by_name(spoil, found):
    made = Builder()
    made.block()
    spoil(made)
    with pytest.raises(QuantizationError, match=f"cannot be rotated: {found}.* leave --rotation"):
        residual_places(made.program())


def test_a_tied_head_right_behind_its_norm_is_refused():
    made = Builder()
    program = made.program(made.call(dialect.LINEAR, made.norm("last"), made.table, width=VOCAB))
    with pytest.raises(QuantizationError, match="table is also the head, into which the"):
        residual_places(program)


def test_a_stream_that_leaves_without_a_norm_is_refused():
    made = Builder()
    with pytest.raises(QuantizationError, match="leaves the model without a norm"):
        residual_places(made.program(made.stream))


def test_values_that_are_not_between_two_linears_are_refused():
    made = Builder()
    heads = made.call(dialect.VIEW, made.norm("g"), (1, 3, 1, WIDTH))
    heads.meta["val"] = torch.empty(1, 3, 1, WIDTH)
    cache = made.placeholder("cache", "cache", torch.empty(1, 1, 8, WIDTH))
    mixed = made.call(dialect.ATTENTION, heads, heads, heads, cache, cache, made.tokens, 0, 1.0)
    with pytest.raises(QuantizationError, match=f"the values of {mixed.name} do not lie directly"):
        value_places(made.program(made.linear("head", mixed, VOCAB)))
