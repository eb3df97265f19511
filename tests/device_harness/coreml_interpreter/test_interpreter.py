"""Whole functions: weights, states, branches, loops, precisions, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.limits import Limits
from device_harness.coreml_interpreter.values import Precision
from device_harness.errors import DeviceError
from exporters.coreml.function import FunctionBuilder, Value, text_value, value_type
from exporters.coreml.package import open_package
from tests.oracles.small_package import (
    BIAS,
    of_function,
    quantized_linear,
    quantized_weight,
    write_package,
)


def opened(path: Path, precision: Precision = Precision.FP16, **options: object) -> Interpreter:
    return Interpreter(open_package(path), precision, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_int4_weights_in_both_precisions(tmp_path: Path, budget: int) -> None:
    package = quantized_linear(tmp_path / "small.mlpackage")
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float16)
    wanted = x.astype(np.float32) @ quantized_weight().T + BIAS
    exact = opened(package, Precision.FP32, budget=budget).run({"x": x})["y"]
    assert exact.dtype == np.float32
    np.testing.assert_allclose(exact, wanted, rtol=1e-6)
    rounded = opened(package, Precision.FP16, budget=budget).run({"x": x})["y"]
    assert rounded.dtype == np.float16
    assert np.array_equal(rounded, exact.astype(np.float16))


def test_nothing_of_coremltools_is_imported() -> None:
    import subprocess

    code = (
        "import sys, device_harness.coreml_interpreter.interpreter, device_harness.registry;"
        "sys.exit('coremltools' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fp16_rounds_each_result_and_fp32_none(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> Value:
        x = f.input("x", "fp16", (1,))
        y = f.call("add", "sum", "fp16", (1,), x=x, y=f.constant(0.25, "fp16"))
        return f.call("sub", "y", "fp16", (1,), x=y, y=x)

    package = of_function(tmp_path / "p.mlpackage", build)
    x = np.array([1024.0], np.float16)  # the next float16 is 1025
    assert opened(package, Precision.FP32).run({"x": x})["y"] == [0.25]
    assert opened(package, Precision.FP16).run({"x": x})["y"] == [0.0]


def test_float32_stays_float32_and_large_halves_become_infinite(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        x = f.input("x", "fp32", (1,))
        square = f.call("square", "wide", "fp32", (1,), x=x)
        return [square, f.call("cast", "narrow", "fp16", (1,), x=square, dtype="fp16")]

    found = opened(of_function(tmp_path / "p.mlpackage", build)).run({"x": np.float32([300.0])})
    assert found["wide"] == [90000.0] and np.isinf(found["narrow"])


def cache_step(f: FunctionBuilder, read_old: bool) -> list[Value]:
    """Writes a row of a state; may also look at the old state afterwards."""
    row, at = f.input("row", "fp16", (1, 3)), f.input("at", "int32", (1,))
    state = f.state("cache", (4, 3))
    old = f.call("read_state", "old", "fp16", (4, 3), input=state)
    zero = f.constant([0], "int32")
    end = f.call("add", "end_row", "int32", (1,), x=at, y=1)
    begin = f.call("concat", "begin", "int32", (2,), values=[at, zero], axis=0, interleave=False)
    ends = f.call("concat", "ends", "int32", (2,), values=[end, zero], axis=0, interleave=False)
    new = f.call(
        "slice_update",
        "new",
        "fp16",
        (4, 3),
        x=old,
        update=row,
        begin=begin,
        end=ends,
        end_mask=[False, True],
    )
    f.call_many("write_state", [], input=state, data=new)
    now = f.call("read_state", "now", "fp16", (4, 3), input=state)
    total = f.call("reduce_sum", "total", "fp16", (3,), x=now, axes=[0], keep_dims=False)
    if not read_old:
        return [total]
    before = f.call("reduce_sum", "before", "fp16", (3,), x=old, axes=[0], keep_dims=False)
    return [total, before]


@pytest.mark.parametrize("read_old", [False, True])
def test_states_outlive_a_call_and_old_values_are_not_overwritten(
    tmp_path: Path, read_old: bool
) -> None:
    package = of_function(tmp_path / "p.mlpackage", lambda f: cache_step(f, read_old))
    interpreter = opened(package)
    states = interpreter.make_states()
    before = np.zeros(3)
    for index in range(4):
        row = np.full((1, 3), index + 1, np.float16)
        found = interpreter.run({"row": row, "at": [index]}, states=states)
        if read_old:
            assert np.array_equal(found["before"], before)
        before = found["total"]
        assert np.array_equal(before, np.full(3, sum(range(1, index + 2))))
    assert np.array_equal(states["cache"].tensor.numpy()[:, 0], [1, 2, 3, 4])
    assert interpreter.run({"row": np.zeros((1, 3)), "at": [0]}, states=interpreter.make_states())[
        "total"
    ].tolist() == [0, 0, 0]


def test_a_slice_is_written_in_place_only_where_nobody_can_tell(tmp_path: Path) -> None:
    for read_old, in_place in ((False, True), (True, False)):
        package = of_function(
            tmp_path / f"{read_old}.mlpackage", lambda f, old=read_old: cache_step(f, old)
        )
        steps = opened(package).bind().steps
        names = [step.run.__name__ for step in steps]
        assert ("slice_update_in_place" in names) is in_place


def loop(f: FunctionBuilder) -> list[Value]:
    """Doubles ``x`` until ``count`` reaches ``limit``."""
    x, limit = f.input("x", "fp32", (1,)), f.input("limit", "int32", (1,))
    start = f.constant([0], "int32")
    results = [("doubled", "fp32", (1,)), ("count", "int32", (1,))]
    made = f.call_many("while_loop", results, loop_vars=[x, start])
    operation = next(
        each
        for block in f.message().block_specializations.values()
        for each in block.operations
        if each.type == "while_loop"
    )
    for outputs in (["more"], ["twice", "next"]):
        block = operation.blocks.add(outputs=outputs)
        for name, dtype in ((f"{outputs[0]}_x", "fp32"), (f"{outputs[0]}_n", "int32")):
            block.inputs.add(name=name, type=value_type(dtype, (1,)))
    one = f.constant([1], "int32")

    def add(block: int, kind: str, name: str, dtype: str, x: str, y: str) -> None:
        inner = operation.blocks[block].operations.add(type=kind)
        inner.outputs.add(name=name, type=value_type(dtype, (1,)))
        inner.attributes["name"].CopyFrom(text_value(name))
        inner.inputs["x"].arguments.add(name=x)
        inner.inputs["y"].arguments.add(name=y)

    add(0, "less", "more", "bool", "more_n", limit.name)
    add(1, "add", "twice", "fp32", "twice_x", "twice_x")
    add(1, "add", "next", "int32", "twice_n", one.name)
    return made


def hoist(package: Path) -> None:
    """Constants made after the loop that uses them go before it."""
    from exporters.coreml.schema import messages

    path = package / "Data/com.apple.CoreML/model.mlmodel"
    model = messages()["Model"].FromString(path.read_bytes())
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            ordered = sorted(block.operations, key=lambda operation: operation.type != "const")
            del block.operations[:]
            block.operations.extend(ordered)
    path.write_bytes(model.SerializeToString(deterministic=True))


def test_loops_and_their_limit(tmp_path: Path) -> None:
    package = of_function(tmp_path / "p.mlpackage", loop)
    hoist(package)
    found = opened(package).run({"x": [1.5], "limit": [5]})
    assert found["doubled"] == [48.0] and found["count"] == [5]
    with pytest.raises(DeviceError, match=r"while_loop.*did not end within 4 iterations"):
        opened(package, limits=Limits(iterations=4)).run({"x": [1.5], "limit": [5]})


def test_the_loops_of_a_call_share_their_iterations(tmp_path: Path) -> None:
    package = of_function(tmp_path / "p.mlpackage", loop)
    hoist(package)
    again(package)
    interpreter = opened(package, limits=Limits(iterations=7))
    with pytest.raises(DeviceError, match=r"did not end within 7 iterations"):
        interpreter.run({"x": [1.5], "limit": [4]})
    assert interpreter.run({"x": [1.5], "limit": [3]})["count"] == [3]


def again(package: Path) -> None:
    """Runs the loop of a package twice, each time on the same values."""
    from exporters.coreml.schema import messages

    path = package / "Data/com.apple.CoreML/model.mlmodel"
    model = messages()["Model"].FromString(path.read_bytes())
    (block,) = model.mlProgram.functions["main"].block_specializations.values()
    (found,) = [each for each in block.operations if each.type == "while_loop"]
    copy = block.operations.add()
    copy.CopyFrom(found)
    for output in copy.outputs:
        output.name += "_again"
    path.write_bytes(model.SerializeToString(deterministic=True))


def test_the_memory_of_a_call_and_its_work_have_bounds(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        x = f.input("x", "fp32", (1000,))
        return [f.call("square", f"y{i}", "fp32", (1000,), x=x) for i in range(5)]

    def chain(f: FunctionBuilder) -> Value:
        x = f.input("x", "fp32", (1000,))
        for i in range(5):
            x = f.call("square", f"y{i}", "fp32", (1000,), x=x)
        return x

    def views(f: FunctionBuilder) -> list[Value]:
        x = f.call("square", "s", "fp32", (1000,), x=f.input("x", "fp32", (1000,)))
        return [f.call("reshape", f"y{i}", "fp32", (10, 100), x=x, shape=(10, 100)) for i in (1, 2)]

    x = {"x": np.ones(1000, np.float32)}
    wide, long, seen = (
        of_function(tmp_path / f"{made.__name__}.mlpackage", made) for made in (build, chain, views)
    )
    with pytest.raises(DeviceError, match=r"values of the call take 20000 bytes at one time"):
        opened(wide, limits=Limits(memory=19_999)).run(x)
    assert len(opened(wide, limits=Limits(memory=20_000)).run(x)) == 5
    assert opened(long, limits=Limits(memory=8_000)).run(x)["y4"][0] == 1  # what is used is freed
    assert len(opened(seen, limits=Limits(memory=4_000)).run(x)) == 2  # views take no memory
    with pytest.raises(DeviceError, match=r"makes more than 4999 elements"):
        opened(long, limits=Limits(work=4_999)).run(x)
    assert opened(long, limits=Limits(work=5_000)).run(x)["y4"][0] == 1


def test_states_have_a_bound_together(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        states = [f.state(name, (1000,)) for name in ("a", "b")]
        return [
            f.call("read_state", f"r{i}", "fp16", (1000,), input=s) for i, s in enumerate(states)
        ]

    package = of_function(tmp_path / "p.mlpackage", build)
    with pytest.raises(DeviceError, match=r"the states take 8000 bytes together"):
        opened(package, limits=Limits(memory=7_999)).make_states()
    assert len(opened(package, limits=Limits(memory=8_000)).make_states()) == 2
    huge = Limits(elements=999)
    with pytest.raises(DeviceError, match=r"more elements than the 999"):
        opened(package, limits=huge).make_states()


def test_a_broadcast_is_checked_before_it_is_made(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        x = f.input("x", "fp32", (-1, 1))
        return [
            f.call(kind, kind, "fp32", (-1, -1), x=x, y=f.input(kind + "y", "fp32", (1, -1)))
            for kind in ("add", "matmul")
        ]

    package = of_function(tmp_path / "p.mlpackage", build)
    x, y = np.ones((4000, 1), np.float32), np.ones((1, 4000), np.float32)
    few = {"x": x[:3], "addy": y[:, :3], "matmuly": y[:, :3]}
    limits = Limits(elements=1 << 20)
    assert opened(package, limits=limits).run(few)["add"].shape == (3, 3)
    for name in ("addy", "matmuly"):
        with pytest.raises(DeviceError, match=r"shape \[4000, 4000\] has more elements"):
            opened(package, limits=limits).run({**few, "x": x, name: y})


def test_scalars_join_and_indices_have_the_type_asked_for(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        x, y = f.input("x", "fp32", ()), f.input("y", "fp32", ())
        joined = f.call("concat", "joined", "fp32", (2,), values=[x, y], axis=0)
        kinds = {"most": "reduce_argmax", "least": "reduce_argmin"}
        return [joined] + [
            f.call(kind, name, "uint16", (), x=joined, axis=0, output_dtype="uint16")
            for name, kind in kinds.items()
        ]

    found = opened(of_function(tmp_path / "p.mlpackage", build)).run({"x": 2.0, "y": 3.0})
    assert found["joined"].tolist() == [2.0, 3.0]
    assert (found["most"], found["least"]) == (1, 0)
    assert found["most"].dtype == np.uint16


@pytest.mark.parametrize("taken", [False, True])
def test_branches(tmp_path: Path, taken: bool) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        x = f.input("x", "fp32", (2,))
        pred = f.call("greater", "pred", "bool", (), x=f.input("which", "fp32", ()), y=0.5)
        made = f.call_many("cond", [("y", "fp32", (2,))], pred=pred)
        operation = f.message().block_specializations["CoreML8"].operations[-1]
        for kind in ("square", "abs"):
            block = operation.blocks.add(outputs=[kind])
            inner = block.operations.add(type=kind)
            inner.outputs.add(name=kind, type=value_type("fp32", (2,)))
            inner.inputs["x"].arguments.add(name=x.name)
        return made

    def literal(f: FunctionBuilder) -> list[Value]:
        f.constant(0.5, "fp32")
        return build(f)

    package = of_function(tmp_path / "p.mlpackage", literal)
    found = opened(package).run({"x": [-3.0, 2.0], "which": np.float32(taken)})
    assert found["y"].tolist() == ([9.0, 4.0] if taken else [3.0, 2.0])


def test_write_state_and_coreml_update_state(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> list[Value]:
        x, state = f.input("x", "fp16", (2,)), f.state("s", (2,))
        old = f.call("read_state", "old", "fp16", (2,), input=state)
        new = f.call("add", "new", "fp16", (2,), x=old, y=x)
        held = f.call("coreml_update_state", "held", "fp16", (2,), state=state, value=new)
        return [old, held]

    interpreter = opened(of_function(tmp_path / "p.mlpackage", build))
    states = interpreter.make_states()
    assert interpreter.run({"x": [1, 2]}, states=states)["old"].tolist() == [0, 0]
    found = interpreter.run({"x": [1, 2]}, states=states)
    assert found["old"].tolist() == [1, 2] and found["held"].tolist() == [2, 4]


def test_functions_share_states_and_weights(tmp_path: Path) -> None:
    builders = [FunctionBuilder(name, "CoreML8") for name in ("one", "two")]
    for builder in builders:
        for value in cache_step(builder, False):
            builder.output(value)
    interpreter = opened(write_package(tmp_path / "p.mlpackage", builders))
    states = interpreter.make_states("one")
    interpreter.run({"row": np.ones((1, 3)), "at": [0]}, "one", states)
    found = interpreter.run({"row": np.ones((1, 3)), "at": [1]}, "two", states)
    assert found["total"].tolist() == [2, 2, 2]


def test_what_is_refused(tmp_path: Path) -> None:
    interpreter = opened(of_function(tmp_path / "p.mlpackage", lambda f: cache_step(f, False)))
    states, row = interpreter.make_states(), np.ones((1, 3))

    def refused(words: str, inputs: dict[str, object], **options: object) -> None:
        with pytest.raises(DeviceError, match=words):
            interpreter.run(inputs, **{"states": states, **options})  # type: ignore[arg-type]

    good = {"row": row, "at": [0]}
    refused("needs the input 'at', which is int32\\[1\\]", {"row": row})
    refused("has no input 'rows'; it has row, at", {**good, "rows": row})
    refused("has shape \\[3\\]; it must be fp16\\[1, 3\\]", {**good, "row": row[0]})
    refused("is float64; it must be int32: give it integers", {**good, "at": [0.5]})
    refused("must be fp16", {**good, "row": np.array([["a", "b", "c"]])})
    refused("uses the state 'cache', which was not given", good, states=None)
    refused(
        "operation .* \\(slice_update 'new'\\): a slice of shape \\[0, 3\\]", {**good, "at": [7]}
    )


def test_an_unknown_operation_is_named_with_its_place(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> Value:
        x = f.input("x", "fp16", (2,))
        y = f.call("relu", "y", "fp16", (2,), x=x)
        return f.call("frobnicate", "z", "fp16", (2,), x=y)

    with pytest.raises(
        DeviceError, match=r"in function main, operation 1 \(frobnicate 'z'\): .* does not know"
    ):
        opened(of_function(tmp_path / "p.mlpackage", build)).bind()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": 3}, "does not know its argument 'alpha'"),
        ({}, "has no argument x"),
    ],
)
def test_arguments_that_are_not_mils(tmp_path: Path, arguments: dict[str, int], words: str) -> None:
    def build(f: FunctionBuilder) -> Value:
        x = f.input("x", "fp16", (2,))
        given = {"x": x, **arguments} if arguments else {}
        return f.call("relu", "y", "fp16", (2,), **given)

    with pytest.raises(DeviceError, match=words):
        opened(of_function(tmp_path / "p.mlpackage", build)).bind()


def test_declared_shapes_are_held_to(tmp_path: Path) -> None:
    def build(f: FunctionBuilder) -> Value:
        return f.call("relu", "y", "fp16", (3,), x=f.input("x", "fp16", (2,)))

    with pytest.raises(DeviceError, match=r"result has shape \[2\] where the program says \[3\]"):
        opened(of_function(tmp_path / "p.mlpackage", build)).run({"x": [1, 2]})


def test_tensors_too_large_are_not_tried(tmp_path: Path) -> None:
    def declared(f: FunctionBuilder) -> Value:
        f.constant([1 << 16, 1 << 16], "int32")
        return f.call(
            "tile", "y", "fp16", (1 << 16, 1 << 16), x=f.input("x", "fp16", (1, 1)), reps=[9, 9]
        )

    def grown(f: FunctionBuilder) -> Value:
        x = f.input("x", "fp16", (1, 1))
        return f.call("tile", "y", "fp16", (-1, -1), x=x, reps=[1 << 16, 1 << 16])

    with pytest.raises(DeviceError, match="more elements than the 536870912"):
        opened(of_function(tmp_path / "a.mlpackage", declared)).bind()
    with pytest.raises(DeviceError, match=r"tile 'y'.*has more elements than"):
        opened(of_function(tmp_path / "b.mlpackage", grown)).run({"x": [[1]]})
    with pytest.raises(DeviceError, match="has more elements than"):
        opened(
            of_function(
                tmp_path / "c.mlpackage",
                lambda f: f.call(
                    "read_state",
                    "y",
                    "fp16",
                    (1 << 20, 1 << 20),
                    input=f.state("s", (1 << 20,) * 2),
                ),
            )
        ).make_states()


def test_masked_ends_of_caches_change_nothing() -> None:
    from device_harness.coreml_interpreter.ops.linear import scaled_dot_product_attention

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, size, 8, generator=generator) for size in (20, 64, 64))
    for lack in (-40000.0, -1.0):
        mask = torch.where(torch.arange(64) < 30, 0.0, lack).expand(20, 64)
        scores = query @ key.transpose(-1, -2) / 8**0.5 + mask
        wanted = torch.softmax(scores, -1) @ value
        found = scaled_dot_product_attention(query, key, value, mask)
        torch.testing.assert_close(found, wanted)
