"""Writes an artifact's program through ExecuTorch's own exporter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from exporters.executorch.stock.coreml_module import CoremlModule
from exporters.executorch.stock.module import StockModule, StockWeights, VulkanModule
from exporters.executorch.stock.names import write_names
from exporters.executorch.stock.vendor import Constants, write_program
from quant.program.program import Program
from quant.store.store import WeightStore

_MODULES: Mapping[str, type[StockModule]] = {
    "xnnpack": StockModule,
    "vulkan": VulkanModule,
    "coreml": CoremlModule,
}


def write_stock(
    methods: Mapping[str, Program],
    store: WeightStore,
    constants: Constants,
    tokens: int,
    backend: str,
    file: Path,
) -> None:
    """Writes a .pte, and beside it a file that says which of its tensors is which weight.

    Args:
        methods: the programs by method name, in the quantized or the lowered dialect.
        store: the store of the weights that the programs name.
        constants: the values that further methods return, by method name.
        tokens: how many tokens one run takes at most.
        backend: the backend of the delegates.
        file: the file to write.

    Raises:
        ExportError: the exporter failed, or changed a weight.
    """
    weights = StockWeights(next(iter(methods.values())), store)
    kind = _MODULES[backend]
    modules = {name: kind(program, weights, tokens) for name, program in methods.items()}
    write_program(modules, constants, tokens, backend, file)
    write_names(file, store, backend)
