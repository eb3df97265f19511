"""Dtypes of torch as ONNX numbers them."""

from __future__ import annotations

from typing import Final

import torch
from onnx import TensorProto

from exporters.errors import ExportError

_ELEMENTS: Final[dict[torch.dtype, int]] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


def element_of(dtype: torch.dtype) -> int:
    """ONNX's number of a dtype.

    Raises:
        ExportError: ONNX has no such dtype.
    """
    if dtype not in _ELEMENTS:
        raise ExportError(f"the module computes with {dtype}, which ONNX has no name for")
    return _ELEMENTS[dtype]
