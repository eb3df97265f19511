"""A traced program whose quantized weights are integers that torch's operators dequantize.

The runtimes' own frontends know these operators: they keep the integers and fold the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from exporters.modules.target import ModuleRequest
from exporters.modules.traced import PREFIX, ModuleWeight
from quant.formats.formats import IntFormat
from quant.formats.packing import unpack_codes
from quant.kernels import native
from quant.store.store import WeightStore

Reader = Callable[["Parts", fx.Graph, fx.Node], fx.Node]
"""Makes the node that replaces one reader of a weight, in front of it."""
aten = torch.ops.aten
LINEAR: Final = aten.linear.default
EMBEDDING: Final = aten.embedding.default
CONVOLUTIONS: Final[tuple[Any, ...]] = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
)
"""Of sequences and of images; not transposed."""
_POOLS: Final = tuple(f"aten.{kind}_pool{axes}d" for kind in ("max", "avg") for axes in (1, 2, 3))


class Parts:
    """A quantized weight's parts as buffers of a graph's module.

    Args:
        owner: the module that owns the graph.
        weight: the weight.
        format: its format; symmetric.
        store: the store that holds it.
    """

    def __init__(
        self, owner: nn.Module, weight: ModuleWeight, format: IntFormat, store: WeightStore
    ) -> None:
        self.weight, self.format = weight, format
        self._owner, self._store = owner, store

    def codes(self) -> torch.Tensor:
        """The integers, ``int8[rows, columns]``, about zero."""
        _, columns = self.weight.matrix
        codes = unpack_codes(self._store.part(self.weight.name, "codes"), self.format, columns)
        return (codes.to(torch.int16) - self.format.implicit_zero_point).to(torch.int8)

    def scale(self) -> torch.Tensor:
        """The scales, ``float32[rows, groups]``."""
        return self._store.part(self.weight.name, "scale").float()

    def buffer(self, graph: fx.Graph, part: str, value: torch.Tensor) -> fx.Node:
        """Keeps a tensor in the module, once for each part, and reads it in the graph."""
        name = f"stored_{self.weight.name}_{part}".replace(".", "_")
        if not hasattr(self._owner, name):
            self._owner.register_buffer(name, value.contiguous())
        return graph.get_attr(name)


def integer_program(
    request: ModuleRequest, readers: Mapping[Any, Reader], floats: Mapping[str, str]
) -> ExportedProgram:
    """Returns the program with integers in place of quantized weights.

    Args:
        request: the traced module and its store.
        readers: by operator, how a reader of a quantized weight is replaced; ``None`` stands for
            all operators without a row.
        floats: the weights that become dequantized floats instead.
    """
    traced, store = request.traced, request.store
    module = traced.program.module(check_guards=False)
    graph = module.graph
    for node in list(graph.find_nodes(op="get_attr")):
        name = str(node.target).removeprefix(PREFIX)
        format = request.format_of(name)
        if store is None or not isinstance(format, IntFormat):
            continue
        weight = traced.weights[name]
        if name in floats:
            _set(module, str(node.target), values_of(store, weight))
            continue
        parts = Parts(module, weight, format, store)
        for user in list(node.users):
            row = readers.get(user.target, readers[None])
            with graph.inserting_before(user):
                row(parts, graph, user)
        if not node.users:
            graph.erase_node(node)
            _set(module, str(node.target), torch.zeros(0))
    graph.lint()
    module.recompile()
    with torch.no_grad():
        made = torch.export.export(
            module,
            traced.examples,
            dynamic_shapes=tuple(traced.dynamic_shapes),
            strict=False,
        )
    _state_strides(made)
    return made


def _state_strides(program: ExportedProgram) -> None:
    """Gives each pooling its stride, the kernel's size where the call leaves it out.

    The frontends of Core ML and XNNPACK have no default for it.
    """
    for node in program.graph.nodes:
        if any(pool in str(node.target) for pool in _POOLS) and len(node.args) == 2:
            node.args = (*node.args, node.args[1])


def values_of(store: WeightStore, weight: ModuleWeight) -> torch.Tensor:
    """The float values of a quantized weight in the parameter's shape."""
    format = store.plan.weights[weight.name].format
    assert isinstance(format, IntFormat)
    codes, scale = (store.part(weight.name, part) for part in ("codes", "scale"))
    return native.unpack(codes, scale, None, format).view(weight.shape)


def _set(module: nn.Module, target: str, value: torch.Tensor) -> None:
    """Replaces a parameter of the graph's module; the user's module keeps its own."""
    path, _, leaf = target.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
