"""`State`: the graph of a module while it is lowered to ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from exporters.modules.onnx.dtypes import element_of
from exporters.onnx.graph import GraphBuilder

if TYPE_CHECKING:
    from exporters.modules.target import ModuleRequest

_FROM_HERE_ON = 2**63 - 1  # what torch writes for "to the end"


class State:
    """A graph under construction.

    Args:
        request: the traced module and its store.
        builder: the graph to add to.
        dequantized: emits the float values of a quantized weight and returns their name.
    """

    def __init__(
        self,
        request: ModuleRequest,
        builder: GraphBuilder,
        dequantized: Callable[[State, str], str],
    ) -> None:
        self.request, self.builder, self._dequantized = request, builder, dequantized
        self.names: dict[fx.Node, str] = {}
        self.parameters: dict[fx.Node, str] = {}
        self.parts: dict[fx.Node, list[str]] = {}
        self._fresh = 0

    def fresh(self, stem: str) -> str:
        """A name that no other value has."""
        self._fresh += 1
        return f"{stem}~{self._fresh}"

    def emit(self, op: str, inputs: Sequence[str], stem: str = "", **attributes: Any) -> str:
        """Appends a node of one output and returns that output's name."""
        domain = attributes.pop("domain", "")
        return self.builder.node(
            op, inputs, self.fresh(stem or op.lower()), domain=domain, **attributes
        )

    def value(self, argument: Any, dtype: torch.dtype | None = None) -> str:
        """The name of an argument's value, cast to a dtype where it has another.

        Args:
            argument: a node, or a number, which becomes a constant.
            dtype: the dtype that the operator needs; None for the argument's own.
        """
        if not isinstance(argument, fx.Node):
            kind = dtype or torch.tensor(argument).dtype
            return self.number(argument, kind)
        name = self._name(argument)
        if dtype is None or dtype_of(argument) == dtype:
            return name
        return self.emit("Cast", [name], to=element_of(dtype))

    def number(self, number: Any, dtype: torch.dtype) -> str:
        """The name of a constant of no dimension."""
        held = torch.tensor(number, dtype=dtype).numpy()
        return self.builder.constant(f"number.{held.dtype}.{number}", held)

    def integers(self, numbers: Sequence[int]) -> str:
        """The name of a constant ``int64[n]``."""
        text = "_".join(map(str, numbers))
        return self.builder.constant(f"integers.{text}", np.array(numbers, np.int64))

    def vector(self, numbers: Sequence[Any]) -> str:
        """The name of ``int64[n]`` of whole numbers, some of which the graph computes."""
        if all(isinstance(number, int) for number in numbers):
            return self.integers(numbers)
        parts = [
            self.integers([number])
            if isinstance(number, int)
            else self.emit("Reshape", [self.value(number), self.integers([1])])
            for number in numbers
        ]
        return parts[0] if len(parts) == 1 else self.emit("Concat", parts, axis=0)

    def shape(self, node: fx.Node, asked: Sequence[Any]) -> str:
        """The name of the shape that a node's value gets.

        At most one dynamic dimension is left to the runtime to find (-1).

        Args:
            node: the node.
            asked: the shape in its arguments.
        """
        dims = shape_of(node)
        unknown = [dim for dim in dims if not isinstance(dim, int)]
        if len(unknown) <= 1 and 0 not in dims:
            return self.integers([dim if isinstance(dim, int) else -1 for dim in dims])
        return self.vector(list(asked))

    def _name(self, node: fx.Node) -> str:
        if node not in self.names:
            # Parameters are added when something reads them: a quantized one has no float value.
            name = self.parameters[node]
            if self.request.format_of(name) is None:
                tensor = self.request.traced.state(name).detach()
                self.names[node] = self.builder.table(f"{name}:float", tensor.contiguous().numpy())
            else:
                self.names[node] = self._dequantized(self, name)
        return self.names[node]


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's positional arguments: nodes, numbers, and lists of them."""
    return tuple(node.args)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value; whole numbers of the graph are int64."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else torch.int64


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's value; dynamic dimensions are torch's symbols."""
    return tuple(node.meta["val"].shape)


def bound(number: Any) -> Any:
    """The end of a slice as ONNX takes it: torch's largest number means the end."""
    return _FROM_HERE_ON if isinstance(number, int) and number > _FROM_HERE_ON else number
