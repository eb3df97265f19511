"""A graph's initializers and numbers, as the handlers of its nodes take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.errors import ExportError
from exporters.lifted import Array, Constant, Probe, Value
from exporters.onnx.model_file import external_place, load_graph
from exporters.onnx.reader import WEIGHT
from quant.input_files import open_input

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

# Constants of so many bytes are weights under an unknown name, and are not read.
_LARGEST_CONSTANT: Final = 1 << 28
_PART_SUFFIXES: Final = (".blocks", ".rows", ".scale", ".zero", ".input_scale", ".stored")
_FLOATS: Final = {1: "fp32", 10: "fp16", 16: "bf16"}


@dataclass(frozen=True, eq=False)
class Part(Value):
    """A part of a weight, or what is computed from parts of one weight alone.

    Attributes:
        weight: the weight's name.
        dtype: the format's name of the initializer's dtype; empty for integers.
        shape: the initializer's shape.
        tensor: the initializer.
    """

    weight: str
    dtype: str
    shape: tuple[int, ...]
    tensor: TensorProto


class Graph:
    """One graph being lifted.

    Args:
        path: the file.
        probes: the calls for which numbers are computed.
        tables: arrays that were read already, by their place; several graphs share them.
    """

    def __init__(
        self, path: Path, probes: tuple[Probe, ...], tables: dict[tuple[object, ...], Array]
    ) -> None:
        self.path, self.probes, self.tables = path, probes, tables
        self.graph = load_graph(path).graph
        self.outputs = {output.name for output in self.graph.output}
        self.values: dict[str, Value] = {}
        self.outside: list[str] = []

    def initializer(self, tensor: TensorProto) -> Value:
        """An initializer as a part of a weight, or as an array."""
        found = WEIGHT.match(tensor.name)
        suffix = tensor.name[found.end() :] if found else ""
        if found and (not suffix or suffix.startswith(_PART_SUFFIXES)):
            dtype = _FLOATS.get(tensor.data_type, "")
            return Part(tensor.name, found[0], dtype, tuple(tensor.dims), tensor)
        return Constant(tensor.name, self.array(tensor))

    def array(self, tensor: TensorProto) -> Array:
        """An initializer's elements.

        Raises:
            ExportError: it is missing, or too large to be anything but a weight.
        """
        from onnx import helper, numpy_helper

        if not tensor.external_data:
            return np.asarray(numpy_helper.to_array(tensor))
        place = external_place(tensor, self.path)
        if place[2] > _LARGEST_CONSTANT:
            raise ExportError(f"{self.path} has a constant of {place[2]} bytes: {tensor.name}")
        key = (*place, tensor.data_type, *tensor.dims)
        if key not in self.tables:
            with open_input(place[0]) as stream:
                stream.seek(place[1])
                data = stream.read(place[2])
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            self.tables[key] = np.frombuffer(data, dtype).reshape(tensor.dims)
        return self.tables[key]

    def input_width(self, name: str) -> int:
        """The last dimension of one of the graph's inputs, a cache.

        Raises:
            ExportError: there is no such input.
        """
        return self.input_shape(name)[3]

    def input_shape(self, name: str) -> tuple[int, ...]:
        """The dimensions of one of the graph's inputs, a state; 0 for those with a name.

        Raises:
            ExportError: there is no such input of four dimensions.
        """
        for given in self.graph.input:
            dimensions = given.type.tensor_type.shape.dim
            if given.name == name and len(dimensions) == 4:
                return tuple(int(each.dim_value) for each in dimensions)
        raise ExportError(f"{self.path} has no input {name} of four dimensions, which it reads")

    def users(self, name: str, op: str) -> list[NodeProto]:
        """The nodes of an operator that read a value."""
        return [node for node in self.graph.node if node.op_type == op and name in node.input]


Lifted = tuple[Value, ...] | None
Handler = Callable[[Graph, "NodeProto", tuple[Value, ...], Mapping[str, Any]], Lifted]
"""Lifts a node; None where the form is not the lowering's."""
