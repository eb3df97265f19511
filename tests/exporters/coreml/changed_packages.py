"""Packages whose weights or operations are changed, and what is lifted from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from exporters.coreml import names
from exporters.coreml.lifted import read_package
from exporters.coreml.package import Package, open_package
from exporters.lifted import Value

MARK = "_changed"


def overwrite(folder: Path, weight: str, value: np.generic) -> None:
    """Fills a matrix's scales, or a float weight, with one value, in an artifact's folder."""
    package = folder / names.PACKAGE
    path = package / names.WEIGHTS_PATH
    data = bytearray(path.read_bytes())
    for operation in open_package(package).operations(names.DECODE):
        if operation.outputs and operation.outputs[0].name == names.identifier(weight):
            given = {key: value.arguments[0].value for key, value in operation.inputs.items()}
            stored = given.get("scale", operation.attributes["val"])
            dims = stored.type.tensorType.dimensions
            count = int(np.prod([each.constant.size for each in dims]))
            start = stored.blobFileValue.offset + 64
            data[start : start + value.nbytes * count] = value.tobytes() * count
    path.write_bytes(data)


def products(folder: Path, weights: Mapping[str, int]) -> dict[str, int]:
    """The experts whose matrices products read, by the products' names.

    Args:
        folder: an artifact.
        weights: the experts, by their matrices' names.
    """
    experts = {names.identifier(weight): expert for weight, expert in weights.items()}
    found = {}
    for operation in open_package(folder / names.PACKAGE).operations(names.DECODE):
        if operation.type == "linear":
            weight = operation.inputs["weight"].arguments[0].name
            if weight in experts:
                found[operation.outputs[0].name] = experts[weight]
    return found


def lifted(opened: Package, entry: int = 0) -> list[Value]:
    """All values that the logits of an entry point depend on."""
    root = read_package(opened, 48, cache_multiple=1).entry_points[entry].logits
    found: dict[int, Value] = {}
    left: list[object] = [root]
    while left:
        value = left.pop()
        if isinstance(value, tuple):
            left += value
        elif isinstance(value, Value) and id(value) not in found:
            found[id(value)] = value
            left += [getattr(value, field.name) for field in fields(value)]
    return list(found.values())


def changed_number(opened: Package, name: str, parameter: str, changes: dict[int, int]) -> None:
    """Gives an operation of every function other numbers, as constants of its own."""
    for function in opened.functions:
        block = opened.block(function)
        inner = [each for outer in block.operations for each in outer.blocks]
        for each in (block, *inner):
            for operation in each.operations:
                if operation.outputs and operation.outputs[0].name == name:
                    source = operation.inputs[parameter].arguments[0].name
                    (const,) = (
                        one for one in block.operations
                        if one.outputs and one.outputs[0].name == source
                    )  # fmt: skip
                    made = block.operations.add()
                    made.CopyFrom(const)
                    made.outputs[0].name = f"{name}_{parameter}{MARK}"
                    held = made.attributes["val"].immediateValue.tensor
                    values = getattr(held, str(held.WhichOneof("value"))).values
                    for index, value in changes.items():
                        values[index] = value
                    operation.inputs[parameter].arguments[0].name = made.outputs[0].name
        # What is read must stand before what reads it.
        ordered = sorted(block.operations, key=lambda each: not str(each.outputs[:1]).count(MARK))
        copies = [type(each).FromString(each.SerializeToString()) for each in ordered]
        del block.operations[:]
        block.operations.extend(copies)
