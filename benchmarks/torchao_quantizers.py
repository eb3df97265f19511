"""Runs torchao's 8da4w quantizer on matrices and returns the stored values.

8da4w is the format of ExecuTorch's own ``export_llm``: 4-bit weights in symmetric groups, 8-bit
activations. Only the weights' values are taken here. Scales are rounded to bfloat16, as XNNPACK
stores them. ``export_llm`` leaves a matrix in float where groups do not divide its columns; here
such a model is refused.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Final

import torch

ALGORITHMS: Final = {"affine": "largest weight", "hqq_scale_only": "HQQ, export_llm's default"}


def quantized(
    weights: Mapping[str, torch.Tensor], group: int, algorithm: str
) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Yields name, stored values and stored bits of every matrix.

    Args:
        weights: ``float32[rows, columns]`` by name.
        group: columns that share a scale.
        algorithm: a key of `ALGORITHMS`: how scales are chosen.

    Raises:
        ValueError: groups do not divide a matrix's columns.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # warnings of the import
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
        from torchao.quantization.granularity import PerGroup

    for name, weight in weights.items():
        rows, columns = weight.shape
        if columns % group:
            raise ValueError(f"groups of {group} do not divide the {columns} columns of {name}")
        module = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False, device="meta"))
        module[0].weight = torch.nn.Parameter(weight, requires_grad=False)
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4,
            weight_granularity=PerGroup(group),
            intx_choose_qparams_algorithm=algorithm,
        )
        quantize_(module, config)
        made = module[0].weight
        if made.zero_point.any():
            raise ValueError(f"{name} got zero points: this is not the symmetric format")
        scale = made.scale.bfloat16().float()[..., None]
        codes = made.qdata.reshape(rows, columns // group, group).float()
        yield name, (codes * scale).reshape(rows, columns), 4.0 * codes.numel() + 16 * scale.numel()
