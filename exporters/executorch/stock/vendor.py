"""All that is asked of ExecuTorch's exporter, its private interfaces included, each with its why.

Written for the version in `exporters.executorch.installed`; a test holds the logits of what comes
out against those of EdgeForge's own lowering, bit for bit.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import nn

from exporters.errors import ExportError

Constants = Mapping[str, int | bool | Sequence[int]]


def write_program(
    methods: Mapping[str, nn.Module], constants: Constants, tokens: int, backend: str, file: Path
) -> None:
    """Exports modules and writes them as one .pte.

    Args:
        methods: modules of ``tokens int64[1, t], position int64[1]``, by method name.
        constants: what further methods return.
        tokens: how many one run takes at most.
        backend: whose partitioner chooses what a delegate computes.
        file: to write.

    Raises:
        ExportError: the exporter failed.
    """
    with _quiet(backend), torch.no_grad():
        # Each import registers operators with torch: embeddings and activations in integers,
        # attention with caches.
        import executorch.kernels.quantized  # noqa: F401
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401

        # torch's own definitions of the operators that spell quantization out: a private module,
        # and nothing else defines `choose_qparams_per_token_asymmetric` for torch.export.
        from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401

        # Defines `torchao::dequantize_affine`, the only integers that the Core ML delegate knows.
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
            # The validity check knows no custom operator, so it would refuse attention; operators
            # that carry an order of dims have no kernels in the LLM runner.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        edge.to_executorch().save(str(file))


def _constant(value: int | bool | Sequence[int]) -> object:
    """A constant method's result: a list is given as its items."""
    return list(value) if isinstance(value, Sequence) else value


def _xnnpack() -> object:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return XnnpackPartitioner()


def _vulkan() -> object:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    # Without it, operators whose kernels cannot follow a prompt's length are taken too.
    return VulkanPartitioner({"require_dynamic_shapes": True})


def _coreml() -> object:
    # coremltools warns of versions of torch and scikit-learn that it was not tested with.
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    # Integers in blocks and states for caches came with iOS 18. `MODEL` stands for a package that
    # the device compiles: Apple's compiler, which would do it here, is on Macs alone.
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        compute_unit=ct.ComputeUnit.ALL,
        model_type=CoreMLBackend.MODEL_TYPE.MODEL,
    )
    # The whole graph with its caches in one delegate, or an error: nothing is left outside.
    return CoreMLPartitioner(
        compile_specs=specs, lower_full_graph=True, take_over_mutable_buffer=True
    )


_PARTITIONERS = {"xnnpack": _xnnpack, "vulkan": _vulkan, "coreml": _coreml}


@contextmanager
def _quiet(backend: str) -> Iterator[None]:
    """Exporters warn, log and draw bars of their own affairs; their errors become one sentence.

    Raises:
        ExportError: the exporter failed, or says that its delegate does not hold something.
    """
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except ExportError:
        raise
    except ModuleNotFoundError as error:
        # ExecuTorch's runtime can be installed without what its exporter imports, as `make demo`
        # does: then running artifacts works and this does not.
        raise ExportError(
            f"ExecuTorch's exporter needs {error.name}, which is not installed: pip install "
            f'"edgeforge[executorch]"'
        ) from error
    except Exception as error:  # its passes raise whatever torch and they themselves do
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        words = next(iter(str(first).strip().splitlines()), type(first).__name__)
        raise ExportError(f"ExecuTorch's exporter failed for {backend}: {words}") from error
    finally:
        logging.disable(logging.NOTSET)
