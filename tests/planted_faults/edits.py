"""Faults that are put into written files, or into one step of the lowering."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from tests.planted_faults.captured import Captured

GRAPHS = ("model.onnx", "verify.onnx")


def alike_layers(captured: Captured) -> tuple[int, int]:
    """The first two layers whose caches have equal shapes."""
    heads = captured.run.facts.num_kv_heads
    for first in range(len(heads)):
        for second in range(first + 1, len(heads)):
            if heads[first] == heads[second]:
                return first, second
    raise ValueError("no two layers have caches of one shape")


def swap_onnx_caches(folder: Path, captured: Captured) -> None:
    """New keys of two layers leave the graphs under each other's names."""
    one, other = (f"present.{layer}.key" for layer in alike_layers(captured))
    edit_onnx(folder, lambda node: _rename_outputs(node, {one: other, other: one}))


def late_onnx_positions(folder: Path, captured: Captured) -> None:
    """The length that the kernel takes is not one less than the number of tokens."""

    def change(node) -> None:
        if node.output[0] == "attended_less_one":
            node.input[1] = "zero"

    edit_onnx(folder, change)


def _rename_outputs(node, names: dict[str, str]) -> None:
    for index, name in enumerate(node.output):
        node.output[index] = names.get(name, name)


def edit_onnx(folder: Path, change: Callable[[object], None]) -> None:
    """Changes the nodes of both graphs, one at a time."""
    import onnx

    for name in GRAPHS:
        path = folder / name
        if path.is_file():
            model = onnx.load(path, load_external_data=False)
            for node in model.graph.node:
                change(node)
            path.write_bytes(model.SerializeToString(deterministic=True))


def swap_coreml_caches(folder: Path, captured: Captured) -> None:
    """New keys of two layers are written to each other's states."""
    one, other = (f"keyCache_{layer}" for layer in alike_layers(captured))
    names = {one: other, other: one}

    def change(block) -> None:
        for operation in block.operations:
            if operation.type == "write_state":
                (binding,) = operation.inputs["input"].arguments
                binding.name = names.get(binding.name, binding.name)

    edit_coreml(folder, change)


def late_coreml_positions(folder: Path, captured: Captured) -> None:
    """Every use of the position takes the position after it."""
    from exporters.coreml.emitter import Emitter

    def change(block) -> None:
        for operation in block.operations:
            for argument in operation.inputs.values():
                for binding in argument.arguments:
                    if binding.name == "position":
                        binding.name = "position_late"
        builder = Emitter("late", "CoreML8")
        position = builder.input("position", "int32", (1,))
        builder.binary("add", "position_late", position, 1)
        made = list(builder.message().block_specializations["CoreML8"].operations)
        made[0].outputs[0].name = "late_one"
        for argument in made[1].inputs.values():
            for binding in argument.arguments:
                if binding.name != "position":
                    binding.name = "late_one"
        rest = list(block.operations)
        del block.operations[:]
        block.operations.extend([*made, *rest])

    edit_coreml(folder, change)


def edit_coreml(folder: Path, change: Callable[[object], None]) -> None:
    """Changes every function's block."""
    from exporters.coreml.names import MODEL_PATH, PACKAGE
    from exporters.coreml.package import open_package

    package = open_package(folder / PACKAGE)
    for function in package.spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            change(block)
    written = package.spec.SerializeToString(deterministic=True)
    (folder / PACKAGE / MODEL_PATH).write_bytes(written)


@contextmanager
def swapped_executorch_caches(captured: Captured) -> Iterator[None]:
    """New keys of two layers are written to each other's caches."""
    from exporters.executorch.method import MethodBuilder

    plan = MethodBuilder.plan
    layers = alike_layers(captured)

    def swapped(self):
        names = {number: key[0] for key, number in self._operators.items()}
        updates = [
            call["instr_args"]["args"]
            for call in self._calls
            if call["instr_args"].table == "KernelCall"
            and names[call["instr_args"]["op_index"]] == "llama::update_cache"
        ]
        if updates:
            each = len(updates) // len(captured.run.facts.num_kv_heads)
            first, second = (updates[layer * each] for layer in layers)
            first[1], second[1] = second[1], first[1]
        return plan(self)

    with patch.object(MethodBuilder, "plan", swapped):
        yield


@contextmanager
def late_executorch_positions(captured: Captured) -> Iterator[None]:
    """Keys and values are cached one row late, and attention begins there."""
    from exporters.executorch.state import MethodLowering

    begin = MethodLowering.begin

    def late(self) -> None:
        begin(self)
        start = self.method.computed_integer()
        one = self.method.integer(1)
        self.method.call("executorch_prim::add", "Scalar", self.start, one, start)
        self.start = start

    with patch.object(MethodLowering, "begin", late):
        yield
