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
