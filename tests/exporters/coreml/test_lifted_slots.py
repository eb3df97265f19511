"""What is read back of mixtures of attention heads, right ones and ones with planted faults."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.values import Precision
from exporters.coreml import names
from exporters.coreml.function import array_value, value_type
from exporters.coreml.lifted import read_package
from exporters.coreml.package import Package, open_package
from exporters.lifted import Bias, Last, Linear, Unknown, Value
from exporters.lifted_mixture import ChosenSlots, Combine, Route, Slots
from quant.program import dialect
from tests.exporters.coreml.changed_packages import changed_number, lifted
from tests.exporters.coreml.slot_models import (
    CHOSEN,
    EXPERTS,
    HEADS,
    SPECS,
    TEXT,
    WAYS,
    WIDTH,
)

SLOTS, OWN = "op_slots_default", "op_combine_default"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_read_back(spec, way, slots_package):
    made = slots_package(spec, way)
    opened = open_package(made.folder / names.PACKAGE)
    reading = read_package(opened, 48, cache_multiple=1)
    for index, entry in enumerate(reading.entry_points):
        assert entry.outside == ()
        values = lifted(opened, index)
        assert [value for value in values if isinstance(value, Unknown)] == []
        assert is_right(values)
        slots = [value for value in values if isinstance(value, Slots)]
        own = [value for value in values if isinstance(value, ChosenSlots)]
        layers = [each for each in made.program.graph.nodes if each.target is dialect.SLOTS]
        assert len(slots) == len(layers) > 0
        for each, layer in zip(sorted(slots, key=lambda each: each.name), layers, strict=True):
            assert (each.chosen, each.heads) == tuple(layer.args[2:4])
        assert {(each.chosen, each.heads) for each in own} == {
            (each.chosen, each.heads) for each in slots
        }


def is_right(values: list[Value]) -> bool:
    """Whether all is known, and each expert reads and writes with its own number and matrices."""
    if any(isinstance(value, Unknown) for value in values):
        return False
    for value in values:
        if isinstance(value, Slots):
            numbers = [expert for expert, _ in value.terms]
            if numbers != list(range(len(numbers))) or not isinstance(value.weights, Route):
                return False
            for expert, result in value.terms:
                if not has_matrix(result, "q_proj", expert):
                    return False
        if isinstance(value, Combine):
            for expert, result in value.terms:
                source = result.source if isinstance(result, Linear) else None
                if isinstance(source, ChosenSlots):
                    own = source.expert == expert and source.weights is value.weights
                    if not own or not has_matrix(result, "o_proj", expert):
                        return False
    return True


def has_matrix(result: Value, part: str, expert: int) -> bool:
    end = f".self_attn.experts.{expert}.{part}.weight"
    return isinstance(result, Linear) and result.weight.name.endswith(end)


def test_the_last_layer_reads_the_last_tokens_slots_of_all(slots_package):
    made = slots_package(
        "heads-and-mixture", "inputs"
    )  # whose function of many tokens gives one's logits
    opened = open_package(made.folder / names.PACKAGE)
    values = lifted(opened)
    (choice,) = {
        value.weights.name: value.weights
        for value in values
        if isinstance(value, ChosenSlots) and isinstance(value.weights, Last)
    }.values()
    slots = [value for value in values if isinstance(value, Slots)]
    assert choice.source in [each.weights for each in slots]
    last = [each for each in values if isinstance(each, ChosenSlots) and each.weights is choice]
    assert {each.expert for each in last} == set(range(5))
    assert {type(each.source) for each in last} == {Last}
    (combine,) = (
        value for value in values if isinstance(value, Combine) and value.weights is choice
    )
    biased = [value for value in values if isinstance(value, Bias) and value.source is combine]
    assert [each.weight.name for each in biased] == ["model.layers.1.self_attn.output.bias"]


def blocks(opened: Package) -> list[Any]:
    """Every block of every function, the inner ones first."""
    found = []
    for function in opened.functions:
        block = opened.block(function)
        found += [inner for outer in block.operations for inner in outer.blocks]
        found.append(block)
    return found


def each_operation(opened: Package, name: str, change: Callable[[Any], None]) -> None:
    """Changes the operations with a result of this name."""
    changed = 0
    for block in blocks(opened):
        for operation in block.operations:
            if operation.outputs and operation.outputs[0].name == name:
                change(operation)
                changed += 1
    assert changed


def read(operation: Any, parameter: str, name: str) -> None:
    """Makes an operation read another value."""
    operation.inputs[parameter].arguments[0].name = name


def interchanged(operation: Any) -> None:
    """Lets two values of a select change places."""
    one, other = (operation.inputs[key].arguments[0] for key in "ab")
    one.name, other.name = other.name, one.name


def turned(opened: Package, name: str) -> None:
    """Lets heads and slots change places behind a result, which keeps its shape."""
    for function in opened.functions:
        block = opened.block(function)
        made = []
        for operation in block.operations:
            made.append(operation)
            if operation.outputs and operation.outputs[0].name == name:
                made += turn(operation)
        copies = [type(each).FromString(each.SerializeToString()) for each in made]
        assert len(copies) > len(block.operations)
        del block.operations[:]
        block.operations.extend(copies)


def turn(operation: Any) -> list[Any]:
    """Renames an operation's result, and returns operations that turn it under its old name."""
    name, kind = operation.outputs[0].name, operation.outputs[0].type
    operation.outputs[0].name = f"{name}_before"
    sizes = [each.constant.size or -1 for each in kind.tensorType.dimensions]
    joined = len(sizes) == 3
    shape = (sizes[1] if joined else sizes[0], HEADS, CHOSEN, WIDTH)
    steps = [("transpose", "perm", (0, 2, 1, 3), shape)]
    if joined:
        steps = [("reshape", "shape", shape, shape), *steps, ("reshape", "shape", sizes, sizes)]
    made, at = [], f"{name}_before"
    for number, (step, parameter, numbers, result) in enumerate(steps):
        constant = type(operation)(type="const")
        value = array_value("int32", np.array(numbers))
        constant.attributes["val"].CopyFrom(value)
        constant.outputs.add(name=f"{name}_{step}_{number}", type=value.type)
        applied = type(operation)(type=step)
        applied.inputs["x"].arguments.add(name=at)
        applied.inputs[parameter].arguments.add(name=constant.outputs[0].name)
        at = name if number == len(steps) - 1 else f"{name}_step_{number}"
        applied.outputs.add(name=at, type=value_type("fp16", tuple(result)))
        made += [constant, applied]
    return made


def numbered(opened: Package, folder: Path, numbers: list[int]) -> None:
    """Writes other numbers of slots into the weight file."""
    path = folder / names.PACKAGE / names.WEIGHTS_PATH
    data = bytearray(path.read_bytes())
    for function in opened.functions:
        for operation in opened.operations(function):
            if operation.outputs and operation.outputs[0].name.startswith("slots_fp"):
                dtype = np.float16 if "fp16" in operation.outputs[0].name else np.float32
                new = np.array(numbers, dtype).tobytes()
                start = operation.attributes["val"].blobFileValue.offset + 64
                data[start : start + len(new)] = new
    path.write_bytes(data)


def across(opened: Package) -> None:
    """Lets the numbers of slots stand where heads do."""

    def change(operation: Any) -> None:
        kinds = [each.type for each in operation.outputs]
        if operation.type == "const":
            kinds.append(operation.attributes["val"].type)
        for kind in kinds:
            _, heads, slots, _ = kind.tensorType.dimensions
            heads.constant.size, slots.constant.size = slots.constant.size, heads.constant.size

    for dtype in ("fp16", "fp32"):
        if any(f"slots_{dtype}_2" in str(block) for block in blocks(opened)):
            each_operation(opened, f"slots_{dtype}_2", change)
    for expert in range(EXPERTS):
        for gather in (SLOTS, f"{SLOTS}_1", OWN, f"{OWN}_1"):
            each_operation(opened, f"{gather}_{expert}_is_own", change)


def of_expert_2(opened: Package, name: str) -> None:
    """Lets an operation select the column of expert 2."""
    changed_number(opened, name, "begin", {-1: 2})
    changed_number(opened, name, "end", {-1: 3})


TOTAL = {"gpu": f"{SLOTS}_3_total", "ane": f"{SLOTS}_3_slots"}
FAULTS: dict[str, Callable[[Package, str], None]] = {
    "a slot of another expert is filled": lambda opened, way: of_expert_2(
        opened, f"{SLOTS}_3_place"
    ),
    "a slot of another expert is read": lambda opened, way: of_expert_2(opened, f"{OWN}_3_place"),
    "the expert itself is not counted": lambda opened, way: changed_number(
        opened, f"{SLOTS}_chosen_counted", "exclusive", {0: 1}
    ),
    "tokens are counted": lambda opened, way: changed_number(
        opened, f"{SLOTS}_chosen_counted", "axis", {0: 1}
    ),
    "all chosen experts have the first slot": lambda opened, way: each_operation(
        opened,
        f"{SLOTS}_chosen_places",
        lambda each: read(each, "a", f"{SLOTS}_chosen_numbers"),
    ),
    "slots are turned before they are joined": lambda opened, way: turned(opened, TOTAL[way]),
    "slots are turned when they are joined": lambda opened, way: turned(opened, SLOTS),
    "slots are turned before they are parted": lambda opened, way: turned(opened, "op_attention"),
    "slots are turned when they are parted": lambda opened, way: turned(opened, f"{OWN}_apart"),
    "slots are told by heads": lambda opened, way: across(opened),
    "heads are added up": lambda opened, way: changed_number(
        opened, f"{OWN}_1_slot", "axes", {0: 1}
    ),
    "what was there stays, and the others are overwritten": lambda opened, way: each_operation(
        opened, f"{SLOTS}_2_slots", interchanged
    ),
    "the sum leaves zeros out": lambda opened, way: each_operation(
        opened, f"{OWN}_2_own", lambda each: read(each, "b", f"{OWN}_apart")
    ),
}


@dataclass(frozen=True)
class Sound:
    """An artifact of the square spec and the logits of its functions.

    Attributes:
        way: how it was exported.
        folder: the artifact.
    """

    way: str
    folder: Path


@pytest.fixture(scope="module", params=["gpu", "ane"])
def sound(request, slots_package):
    made = slots_package("square", request.param)
    assert is_right(lifted(open_package(made.folder / names.PACKAGE)))
    return Sound(request.param, made.folder)


def logits(opened: Package) -> np.ndarray:
    """The logits of a text of one call, with nothing rounded."""
    interpreter = Interpreter(opened, Precision.FP32)
    inputs = {names.TOKENS: TEXT[None, :16].astype(np.int32), names.POSITION: np.zeros(1, np.int32)}
    states = interpreter.make_states(names.PREFILL)
    return interpreter.run(inputs, names.PREFILL, states)[names.LOGITS]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_not_taken_for_the_right_thing(fault, sound):
    opened = open_package(sound.folder / names.PACKAGE)
    wanted = logits(opened)
    FAULTS[fault](opened, sound.way)
    assert not np.allclose(logits(opened), wanted, rtol=0, atol=1e-3 * np.ptp(wanted))
    for entry in range(len(opened.functions)):
        assert not is_right(lifted(opened, entry))


def test_other_numbers_of_slots_are_not_taken_for_the_right_ones(sound, tmp_path):
    wanted = logits(open_package(sound.folder / names.PACKAGE))
    broken = shutil.copytree(sound.folder, tmp_path / "broken")
    numbered(open_package(broken / names.PACKAGE), broken, [1, 1])
    opened = open_package(broken / names.PACKAGE)
    assert not np.allclose(logits(opened), wanted, rtol=0, atol=1e-3 * np.ptp(wanted))
    assert not is_right(lifted(opened))


def test_a_branch_of_another_experts_condition_is_not_taken_for_its_own(slots_package):
    made = slots_package("square", "gpu")
    opened = open_package(made.folder / names.PACKAGE)
    changed_number(opened, f"{SLOTS}_3_used", "begin", {0: 2})
    changed_number(opened, f"{SLOTS}_3_used", "end", {0: 3})
    assert any(isinstance(value, Unknown) for value in lifted(opened))
