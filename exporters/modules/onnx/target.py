"""The ONNX target of modules: one graph and its weight file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.errors import ExportError
from exporters.modules.target import LoweredModule, ModuleRequest

if TYPE_CHECKING:
    from quant.formats.formats import WeightFormat

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
ROUNDED: Final = (
    "products with quantized weights round their inputs to 8 bits (MatMulNBits, accuracy level 4)"
)


class OnnxModules:
    """Modules for ONNX Runtime."""

    name = "onnx"
    tolerance = 0.05

    def write(self, request: ModuleRequest, folder: Path) -> LoweredModule:
        """Writes the graph and its weight file."""
        import onnx

        from exporters.modules.onnx.lowering import lower
        from exporters.onnx.weight_file import WeightFile

        weights = WeightFile(WEIGHTS)
        model = lower(request, weights)
        weights.write(folder)
        (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(folder / GRAPH))
        except onnx.checker.ValidationError as error:
            raise ExportError(f"onnx.checker refuses {GRAPH}: {error}") from error
        rounded = any(node.op_type == "MatMulNBits" for node in model.graph.node)
        return LoweredModule(GRAPH, notes=(ROUNDED,) if rounded else ())

    def stored_digests(
        self, folder: Path, entry: str, formats: Mapping[str, WeightFormat]
    ) -> Mapping[str, str]:
        """Digests of the integers and scales that the graph and its weight file hold."""
        from exporters.modules.onnx.reader import stored_digests

        return stored_digests(folder / entry, formats)
