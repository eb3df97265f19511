"""A function under construction: unique names, shared constants, types as stated."""

from __future__ import annotations

import numpy as np
import pytest

from exporters.coreml.emitter import Emitter
from exporters.coreml.function import FileValue, value_type
from exporters.coreml.names import identifier, weight_name
from exporters.errors import ExportError


@pytest.fixture
def emitter():
    return Emitter("main", "CoreML8")


def operations(emitter):
    return list(emitter.message().block_specializations["CoreML8"].operations)


def test_a_name_that_is_taken_gets_a_number(emitter):
    x = emitter.input("x", "fp16", (2, 3))
    first = emitter.binary("add", "y", x, x)
    second = emitter.binary("mul", "y", first, x)
    assert (first.name, second.name) == ("y", "y_1")
    (add, mul) = operations(emitter)
    assert [argument.name for argument in mul.inputs["x"].arguments] == ["y"]
    assert add.attributes["name"].immediateValue.tensor.strings.values == ["y"]


def test_two_values_of_one_name_are_never_made(emitter):
    emitter.input("x", "fp16", (2,))
    with pytest.raises(AssertionError, match="main has two values called x"):
        emitter.input("x", "fp16", (2,))
    emitter.stored("w", FileValue("fp16", (2,), 64))
    with pytest.raises(AssertionError, match="main has two values called w"):
        emitter.state("w", (1, 2))


def test_equal_constants_are_emitted_once_and_by_type(emitter):
    one = emitter.constant(1)
    assert emitter.constant(1) is one
    others = [emitter.constant(1.0), emitter.constant(1.0, "fp32"), emitter.constant([1])]
    others += [emitter.constant(True), emitter.constant("1")]
    assert len({value.name for value in (one, *others)}) == 6 == len(operations(emitter))
    kinds = [value.dtype for value in (one, *others)]
    assert kinds == ["int32", "fp16", "fp32", "int32", "bool", "string"]


def test_a_long_constant_does_not_go_into_the_text(emitter):
    with pytest.raises(AssertionError, match="long constants belong in the weight file"):
        emitter.constant(list(range(10)))


def test_a_size_that_depends_on_the_tokens_is_unknown_and_not_variadic():
    tensor = value_type("fp16", (1, -1, 4)).tensorType
    assert tensor.rank == 3
    assert [dim.WhichOneof("dimension") for dim in tensor.dimensions] == [
        "constant",
        "unknown",
        "constant",
    ]
    assert not tensor.dimensions[1].unknown.variadic


def test_weights_of_a_name_are_made_once(emitter):
    parts = {"data": FileValue("int4", (4, 8), 64), "scale": FileValue("fp16", (4, 1), 192)}
    made = [
        emitter.constexpr("constexpr_blockwise_shift_scale", "w", "fp16", (4, 8), parts)
        for _ in range(2)
    ]
    assert made[0] is made[1] and len(operations(emitter)) == 1
    assert operations(emitter)[0].inputs["scale"].arguments[0].value.blobFileValue.offset == 192


@pytest.mark.parametrize("name", ["a__b", "a b", "", "a/b", "ä", "__"])
def test_weight_names_that_could_not_be_read_back(name):
    with pytest.raises(ExportError, match="cannot name a weight in a Core ML package"):
        identifier(name)


def test_weight_names_are_read_back():
    for name in ("lm_head.weight", "model.layers.10.self_attn.q_norm.weight"):
        assert weight_name(identifier(name)) == name
        assert identifier(name).isidentifier()


def test_operations_broadcast_as_numpy_does(emitter):
    shapes = (3, 1), (1, 4), (2, 3, 1), (4,)
    for index, one in enumerate(shapes):
        for other in shapes:
            x = emitter.input(f"x_{index}_{len(emitter.inputs)}", "fp16", one)
            y = emitter.input(f"y_{index}_{len(emitter.inputs)}", "fp16", other)
            wanted = np.broadcast_shapes(one, other)
            assert emitter.binary("add", "sum", x, y).shape == wanted


def test_a_branch_holds_its_weights_and_the_function_small_constants(emitter):
    x = emitter.input("x", "fp16", (1, 4))
    pred = emitter.input("pred", "bool", ())
    totals = []
    for name in ("a", "b"):

        def then(name=name):
            weight = emitter.stored(f"{name}__weight", FileValue("fp16", (1, 4), 64))
            bias = emitter.stored("no_bias", FileValue("fp16", (4,), 128), shared=True)
            shifted = emitter.binary("add", "shifted", x, emitter.cast_once("w", weight, "fp16"))
            return emitter.binary("mul", "scaled", emitter.binary("add", "y", shifted, bias), 2.0)

        totals.append(emitter.cond("total", pred, then, lambda: emitter.unary("identity", "z", x)))
    assert [total.name for total in totals] == ["total", "total_1"]
    kinds = [(each.type, each.outputs[0].name) for each in operations(emitter)]
    assert kinds == [
        ("const", "no_bias"),
        ("const", "fp16_const"),
        ("cond", "total"),
        ("cond", "total_1"),
    ]
    first, second = (
        [each.outputs[0].name for each in operation.blocks[0].operations]
        for operation in operations(emitter)[2:]
    )
    assert first == ["a__weight", "shifted", "y", "scaled"]
    assert second == ["b__weight", "shifted_1", "y_1", "scaled_1"]
    assert list(operations(emitter)[2].blocks[1].outputs) == ["z"]


def test_what_a_branch_makes_once_no_other_branch_reads(emitter):
    x = emitter.input("x", "fp32", (2,))
    pred = emitter.input("pred", "bool", ())

    def cast():
        return emitter.cast_once("half", x, "fp16")

    emitter.cond("inner", pred, cast, cast)
    operation = operations(emitter)[-1]  # behind the text that names the dtype
    assert [block.operations[0].outputs[0].name for block in operation.blocks] == ["half", "half_1"]
    before = cast()
    emitter.cond("again", pred, lambda: emitter.binary("add", "y", cast(), cast()), cast)
    (add,) = operations(emitter)[-1].blocks[0].operations
    assert [add.inputs[key].arguments[0].name for key in ("x", "y")] == [before.name] * 2


def test_branches_of_different_types_are_never_made(emitter):
    x = emitter.input("x", "fp32", (2,))
    pred = emitter.input("pred", "bool", ())
    with pytest.raises(AssertionError, match="total"):
        emitter.cond(
            "total", pred, lambda: emitter.cast("h", x, "fp16"),
            lambda: emitter.unary("identity", "z", x),
        )  # fmt: skip
