"""The dialects: every departure is refused by its name."""

import pytest
import torch
from torch import fx

from quant.errors import QuantizationError
from quant.program import dialect
from quant.program.dialect import DialectError, check_float, check_lowered, check_quantized
from quant.program.program import Input, Program, node_argument, shape_of

VOCAB = 6


class Builder:
    """A program of one linear layer, to be spoilt."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: dict[str, Input] = {}
        self.weight = self.placeholder("w", Input("weight", "w"), torch.empty(VOCAB, 4))
        self.x = self.placeholder("x", Input("tokens", "x"), torch.empty(1, 3, 4))

    def placeholder(self, name: str, given: Input | None, value: torch.Tensor) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        if given is not None:
            self.inputs[node.name] = given
        return node

    def call(self, target, *args, shape=(1, 3, VOCAB), **kwargs) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = torch.empty(shape)
        return node

    def program(self, output: fx.Node) -> Program:
        self.graph.output((output,))
        return Program(self.graph, self.inputs, {}, 8, VOCAB)


def test_a_program_of_the_dialect_passes():
    made = Builder()
    program = made.program(made.call(dialect.LINEAR, made.x, made.weight))
    check_float(program)
    check_quantized(program)


def test_the_dialects_lie_in_each_other():
    assert dialect.FLOAT_DIALECT < dialect.QUANTIZED_DIALECT < dialect.LOWERED_DIALECT
    assert dialect.QUANTIZED_DIALECT >= dialect.POINTWISE
    assert dialect.ATTENTION not in dialect.POINTWISE
    assert dialect.VIEW not in dialect.POINTWISE
    assert dialect.BRANCHING | dialect.GATHERING < dialect.MIXTURE <= dialect.FLOAT_DIALECT
    # Slots hold a token's own results, but only a whole mixture can be computed for fewer tokens.
    assert not (dialect.BRANCHING | dialect.GATHERING) & dialect.POINTWISE


@pytest.mark.parametrize("name", ["experts", "expert_queries", "expert_outputs"])
def test_what_stands_for_experts_while_tracing_is_in_no_dialect(name):
    assert getattr(torch.ops.edgeforge, name).default not in dialect.LOWERED_DIALECT


def test_a_foreign_operator_is_refused_by_name():
    made = Builder()
    y = made.call(dialect.LINEAR, made.x, made.weight)
    program = made.program(made.call(torch.ops.aten.gelu.default, y))
    for check, label in (
        (check_float, "float"),
        (check_quantized, "quantized"),
        (check_lowered, "lowered"),
    ):
        with pytest.raises(DialectError, match=rf"the {label} program calls aten\.gelu\.default"):
            check(program)


def test_quantized_operators_are_not_in_the_float_dialect():
    made = Builder()
    codes = made.placeholder("c", Input("weight", "w", "codes"), torch.empty(VOCAB, 4))
    scale = made.placeholder("s", Input("weight", "w", "scale"), torch.empty(VOCAB, 1))
    y = made.call(dialect.QUANT_LINEAR, made.x, codes, scale, None, "int8-pc")
    program = made.program(y)
    check_quantized(program)
    with pytest.raises(DialectError, match="quant_linear"):
        check_float(program)


def test_the_last_tokens_slice_is_in_the_lowered_dialect_only():
    made = Builder()
    y = made.call(dialect.LINEAR, made.x, made.weight)
    program = made.program(made.call(dialect.LAST, y, 1, -1, 2**63 - 1))
    with pytest.raises(DialectError, match="slice"):
        check_quantized(program)


def test_the_lowered_program_gives_one_position():
    made = Builder()
    y = made.call(dialect.LINEAR, made.x, made.weight)
    last = made.call(dialect.LAST, y, 1, -1, 2**63 - 1, shape=(1, 1, VOCAB))
    check_lowered(made.program(last))
    made = Builder()
    every = made.program(made.call(dialect.LINEAR, made.x, made.weight))
    check_quantized(every)
    with pytest.raises(DialectError, match=r"the lowered program returns shape .* not one posit"):
        check_lowered(every)


def test_keyword_arguments_are_refused():
    made = Builder()
    y = made.call(dialect.LINEAR, made.x, made.weight)
    program = made.program(made.call(dialect.ADD, y, y, alpha=2))
    with pytest.raises(DialectError, match="keyword alpha, which exporters ignore"):
        check_float(program)


def test_an_input_without_a_meaning_is_refused():
    made = Builder()
    made.placeholder("stranger", None, torch.empty(1))
    program = made.program(made.call(dialect.LINEAR, made.x, made.weight))
    with pytest.raises(DialectError, match="unnamed input stranger"):
        check_float(program)


def test_other_kinds_of_node_are_refused():
    made = Builder()
    y = made.call(dialect.LINEAR, made.x, made.weight)
    method = made.graph.call_method("relu", (y,))
    method.meta["val"] = y.meta["val"]
    with pytest.raises(DialectError, match="has a call_method node at relu"):
        check_float(made.program(method))


@pytest.mark.parametrize("shape", [(3, VOCAB), (2, 3, VOCAB), (1, 3, VOCAB + 1)])
def test_an_output_that_is_no_logits_is_refused(shape):
    made = Builder()
    program = made.program(made.call(dialect.LINEAR, made.x, made.weight, shape=shape))
    with pytest.raises(DialectError, match=r"returns shape .*, not logits \[1, t, 6\]"):
        check_float(program)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda made: (made.scale, made.codes, None), "argument 1 is not a weight's codes"),
        (lambda made: (made.codes, made.codes, None), "argument 2 is not a weight's scale"),
        (lambda made: (made.codes, made.scale, made.scale), "argument 3 is not a .* zero_point"),
        (lambda made: (made.codes, None, None), "argument 2 is not"),
        (lambda made: (made.computed, made.scale, None), "argument 1 is not"),
        (lambda made: (made.table, made.scale, None), "argument 1 is not"),
    ],
)
def test_the_parts_of_a_weight_must_be_in_their_places(spoil, words):
    made = Builder()
    made.codes = made.placeholder("c", Input("weight", "w", "codes"), torch.empty(VOCAB, 4))
    made.scale = made.placeholder("s", Input("weight", "w", "scale"), torch.empty(VOCAB, 1))
    made.table = made.placeholder("t", Input("table", "t", "codes"), torch.empty(VOCAB, 4))
    made.computed = made.call(dialect.LINEAR, made.x, made.weight)
    y = made.call(dialect.QUANT_LINEAR, made.x, *spoil(made), "int8-pc")
    with pytest.raises(DialectError, match=words):
        check_quantized(made.program(y))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda made: (made.codes, made.lut, None), None),
        (lambda made: (made.codes, made.scale, None), "argument 2 is not a weight's lut"),
        (lambda made: (made.codes, made.lut, made.scale), "argument 3 must be None for a palette"),
        (lambda made: (made.lut, made.codes, None), "argument 1 is not a weight's codes"),
    ],
)
def test_a_palettes_tables_stand_in_the_place_of_scales(spoil, words):
    made = Builder()
    made.codes = made.placeholder("c", Input("weight", "w", "codes"), torch.empty(VOCAB, 4))
    made.scale = made.placeholder("s", Input("weight", "w", "scale"), torch.empty(VOCAB, 1))
    made.lut = made.placeholder("l", Input("weight", "w", "lut"), torch.empty(1, 256))
    program = made.program(made.call(dialect.QUANT_LINEAR, made.x, *spoil(made), "lut8-pt"))
    if words is None:
        check_quantized(program)
    else:
        with pytest.raises(DialectError, match=words):
            check_quantized(program)


def test_activations_are_rounded_for_products_with_integers_alone():
    made = Builder()
    rounded = made.call(dialect.ROUND_PER_TOKEN, made.x)
    program = made.program(made.call(dialect.LINEAR, rounded, made.weight))
    with pytest.raises(DialectError, match="is read by others than products with integer weights"):
        check_quantized(program)


@pytest.mark.parametrize("part", ["scale", "input_scale"])
def test_activations_are_rounded_by_a_scale_of_the_store(part):
    made = Builder()
    codes = made.placeholder("c", Input("weight", "w", "codes"), torch.empty(VOCAB, 4))
    scale = made.placeholder("s", Input("weight", "w", "scale"), torch.empty(VOCAB, 1))
    step = made.placeholder("i", Input("weight", "w", part), torch.empty(1, 1))
    rounded = made.call(dialect.ROUND_PER_TENSOR, made.x, step)
    program = made.program(made.call(dialect.QUANT_LINEAR, rounded, codes, scale, None, "int8-pc"))
    if part == "input_scale":
        check_quantized(program)
    else:
        with pytest.raises(DialectError, match="argument 1 is not the scale of a weight's inputs"):
            check_quantized(program)


def test_a_dialect_error_is_a_quantization_error():
    assert issubclass(DialectError, QuantizationError)


def test_shapes_show_what_is_dynamic():
    exported = torch.export.export(
        torch.nn.Identity(),
        (torch.empty(2, 5),),
        dynamic_shapes=({1: torch.export.Dim("t", min=1, max=64)},),
    )
    node = next(n for n in exported.graph.nodes if n.op == "placeholder")
    assert shape_of(node) == (2, -1)


def test_a_nodes_argument_is_given():
    made = Builder()
    y = made.call(dialect.LINEAR, made.x, made.weight)
    assert node_argument(y, 1) is made.weight
