"""The Core ML target of modules: coremltools' converter, with integers as blockwise constants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.errors import ExportError
from exporters.modules.target import LoweredModule, ModuleRequest
from exporters.modules.traced import require_largest_sizes

if TYPE_CHECKING:
    from torch import fx
    from torch.export import ExportedProgram

    from exporters.modules.integer_program import Parts
    from exporters.modules.traced import TracedModule
    from quant.formats.formats import WeightFormat

PACKAGE: Final = "model.mlpackage"
WEIGHTS: Final = "Data/com.apple.CoreML/weights/weight.bin"
_OWNER: Final = "coremltools' converter"


class CoremlModules:
    """Modules as Core ML packages for iOS 18 and macOS 15."""

    name = "coreml"
    tolerance = 0.05

    def write(self, request: ModuleRequest, folder: Path) -> LoweredModule:
        """Converts the program and saves the package."""
        import torch

        from exporters.modules.integer_program import integer_program
        from exporters.modules.places import write_places
        from exporters.vendor_output import quiet

        _check_inputs(request.traced)
        with quiet(_OWNER, "this module", "coreml"), torch.no_grad():
            import coremltools as ct

            # Define `dequantize_per_channel` and `dequantize_affine`, the forms of integer weights
            # that the converter turns into constants of its own.
            from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401
            from torchao.quantization import quant_primitives  # noqa: F401

            inputs = _inputs(request.traced)
            program = integer_program(request, {None: _dequantized}, {})
            model = ct.convert(
                _known(program),
                inputs=inputs,
                outputs=[ct.TensorType(name=value.name) for value in request.traced.outputs],
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
            )
            model.save(str(folder / PACKAGE))
        weights = folder / PACKAGE / WEIGHTS
        store = request.store if weights.is_file() else None
        floats = write_places(weights, folder, store, "coreml", {})
        return LoweredModule(PACKAGE, floats, ("products and activations are float16",))

    def stored_digests(
        self, folder: Path, entry: str, formats: Mapping[str, WeightFormat]
    ) -> Mapping[str, str]:
        """Digests of the integers and scales that the package holds."""
        from exporters.modules.places import read_digests

        return read_digests(folder)


def _known(program: ExportedProgram) -> ExportedProgram:
    """Decomposes the operators that the converter does not know, as far as torch can."""
    import torch
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        is_torch_fx_node_supported,
    )

    table = torch.export.default_decompositions()
    asked: set[object] = set()
    while True:
        program = program.run_decompositions({op: table[op] for op in asked})
        unknown = {
            node.target
            for node in program.graph.nodes
            if node.target in table
            # The converter takes a name that ends in "_" for an operator that changes its operand.
            and (".__" in str(node.target) or not is_torch_fx_node_supported(node))
        }
        if unknown <= asked:
            return program
        asked |= unknown


def _check_inputs(traced: TracedModule) -> None:
    """Refuses inputs that Core ML does not have.

    Raises:
        ExportError: an input is boolean, or a dynamic dimension has no largest size.
    """
    require_largest_sizes(traced, "Core ML")
    for value in traced.inputs:
        if value.dtype == "bool":
            raise ExportError(
                f"the input {value.name} is boolean, which Core ML has no inputs of: take int64 or "
                f"float32 and compare it in forward"
            )


def _inputs(traced: TracedModule) -> list[Any]:
    """The inputs as coremltools takes them."""
    import coremltools as ct
    import numpy as np

    dims: dict[str, Any] = {}
    for name, (least, most) in traced.ranges.items():
        dims[name] = ct.RangeDim(least, most)
    kinds = {"float32": np.float32, "int64": np.int32, "int32": np.int32}
    return [
        ct.TensorType(
            name=value.name,
            shape=[dims[dim] if isinstance(dim, str) else dim for dim in value.dims],
            dtype=kinds[value.dtype],
        )
        for value in traced.inputs
    ]


def _dequantized(parts: Parts, graph: fx.Graph, user: fx.Node) -> fx.Node:
    """Puts an operator that the converter knows between the integers and their reader."""
    node = next(n for n in user.all_input_nodes if _names(n, parts.weight.name))
    wide = _matrix(parts, graph) if len(parts.weight.shape) == 2 else _kernel(parts, graph)
    user.replace_input_with(node, wide)
    return wide


def _matrix(parts: Parts, graph: fx.Graph) -> fx.Node:
    import torch

    format, scale = parts.format, parts.scale()
    half = format.implicit_zero_point
    held = [
        parts.buffer(graph, "scale", scale),
        parts.buffer(graph, "zero", torch.zeros_like(scale, dtype=torch.int8)),
    ]
    codes = parts.buffer(graph, "codes", parts.codes())
    block = [1, format.columns_per_group(parts.weight.matrix[1])]
    return graph.call_function(
        torch.ops.torchao.dequantize_affine.default,
        (codes, block, *held, torch.int8, -half, half - 1),
    )


def _kernel(parts: Parts, graph: fx.Graph) -> fx.Node:
    """A convolution's kernel, which has 8 bits and one scale for each output channel."""
    import torch

    kernels: Any = torch.ops.quantized_decomposed
    scale = parts.scale()[:, 0]
    held = [
        parts.buffer(graph, "codes", parts.codes().view(parts.weight.shape)),
        parts.buffer(graph, "scale", scale),
        parts.buffer(graph, "zero", torch.zeros(len(scale), dtype=torch.int8)),
    ]
    return graph.call_function(
        kernels.dequantize_per_channel.default, (*held, 0, -128, 127, torch.int8)
    )


def _names(node: fx.Node, weight: str) -> bool:
    from exporters.modules.traced import PREFIX

    return node.op == "get_attr" and str(node.target).removeprefix(PREFIX) == weight
