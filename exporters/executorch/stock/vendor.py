"""Every use of ExecuTorch's exporter, its private interfaces included, each with the reason.

It is written for the version in `exporters.executorch.installed`. A test compares the logits of the
exported program with those of EdgeForge's own lowering, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from exporters.vendor_output import quiet

Constants = Mapping[str, int | bool | Sequence[int]]


def write_program(
    methods: Mapping[str, nn.Module], constants: Constants, tokens: int, backend: str, file: Path
) -> None:
    """Exports modules and writes them as one .pte.

    Args:
        methods: the modules by method name; each takes ``tokens int64[1, t], position int64[1]``.
        constants: the values that further methods return, by method name.
        tokens: how many tokens one run takes at most.
        backend: the backend whose partitioner chooses what a delegate computes.
        file: the file to write.

    Raises:
        ExportError: the exporter failed.
    """
    with quiet("ExecuTorch's exporter", backend, "executorch"), torch.no_grad():
        # These imports register operators with torch: lookups in integer tables and the rounding of
        # activations, and attention with caches.
        import executorch.kernels.quantized  # noqa: F401
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        # torch's own definitions of the `quantized_decomposed` operators. The module is private,
        # but nothing else defines `choose_qparams_per_token_asymmetric` for torch.export.
        from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401

        # Defines `torchao::dequantize_affine`, the only form of integer weights that the Core ML
        # delegate knows.
        from torchao.quantization import quant_primitives  # noqa: F401

        length = torch.export.Dim("tokens", min=1, max=tokens) if tokens > 1 else None
        example = (
            torch.zeros(1, min(4, tokens), dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
        )
        programs = {
            name: torch.export.export(
                module.eval(),
                example,
                dynamic_shapes=({1: length} if length else None, None),
                strict=False,
            )
            for name, module in methods.items()
        }
        edge = to_edge_transform_and_lower(
            programs,
            partitioner={name: [_PARTITIONERS[backend]()] for name in programs},
            constant_methods={name: _constant(value) for name, value in constants.items()},
            # The validity check does not know custom operators, so it would refuse attention. The
            # LLM runner has no kernels for the operators that carry an order of dimensions.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        edge.to_executorch().save(str(file))


def _constant(value: int | bool | Sequence[int]) -> object:
    """A constant method's result; a sequence becomes a list."""
    return list(value) if isinstance(value, Sequence) else value


def _xnnpack() -> object:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _vulkan() -> object:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    # Without this option, the delegate also takes operators whose kernels need a fixed length.
    return VulkanPartitioner({"require_dynamic_shapes": True})


def _coreml() -> object:
    # coremltools warns about versions of torch and scikit-learn that it was not tested with, which
    # `quiet` suppresses; so it is imported here.
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    # Integers with blocks, and states for caches, need iOS 18. `MODEL` means a package that the
    # device compiles; Apple's compiler, which could compile it here, exists only on Macs.
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        compute_unit=ct.ComputeUnit.ALL,
        model_type=CoreMLBackend.MODEL_TYPE.MODEL,
    )
    # The whole graph with its caches must go into one delegate; otherwise the export fails.
    return CoreMLPartitioner(
        compile_specs=specs, lower_full_graph=True, take_over_mutable_buffer=True
    )


_PARTITIONERS = {"xnnpack": _xnnpack, "vulkan": _vulkan, "coreml": _coreml}
