"""How the interpreter holds and rounds the values of a MIL program."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from device_harness.errors import DeviceError
from exporters.coreml.constants import Constant


class Precision(Enum):
    """How floats are rounded.

    Attributes:
        FP32: no value is rounded; all floats are float32, and constants are exactly as stored.
        FP16: the result of every operation is rounded to float16 where the program's type says so;
            each operation computes and accumulates in float32.
    """

    FP32 = "fp32"
    FP16 = "fp16"


# PyTorch's types that hold values of MIL's types. float16 values are held as float32 and rounded,
# because processors without float16 arithmetic are ten times slower in it. uint16 and uint32, for
# which PyTorch has few operations, are held in signed integers of the next size, and uint64 in
# int64.
STORAGE: Final[dict[str, torch.dtype]] = {
    "bool": torch.bool,
    "fp16": torch.float32,
    "bf16": torch.float32,
    "fp8e4m3fn": torch.float32,
    "fp8e5m2": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int4": torch.int8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint1": torch.uint8,
    "uint2": torch.uint8,
    "uint3": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "uint64": torch.int64,
}
FLOATS: Final = frozenset(name for name, dtype in STORAGE.items() if dtype.is_floating_point)
_OUTSIDE: Final[dict[str, str]] = {
    "bool": "?",
    "fp16": "f2",
    "fp64": "f8",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "int64": "i8",
    "uint8": "u1",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
}


def round_to_half(values: Tensor) -> Tensor:
    """Rounds to the nearest float16, ties to even; infinite past 65,519. The dtype stays float32.

    >>> round_to_half(torch.tensor([0.1, 70000.0])).tolist()
    [0.0999755859375, inf]
    """
    return values.half().float()


def storage(dtype: str, where: str) -> torch.dtype:
    """PyTorch's type that holds values of a MIL type.

    Raises:
        DeviceError: the interpreter has no tensors of that type.
    """
    if dtype not in STORAGE:
        raise DeviceError(f"{where} is of type {dtype}, which the interpreter does not know")
    return STORAGE[dtype]


def held(codes: npt.NDArray[Any], dtype: str) -> Tensor:
    """Converts elements read from a package to the tensor that holds them here.

    Args:
        codes: the elements; bf16 and 8-bit floats as their bits.
        dtype: MIL's name of their type.
    """
    array = np.ascontiguousarray(codes)
    if dtype == "bf16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).float()
    if dtype in ("fp8e4m3fn", "fp8e5m2"):
        kind = torch.float8_e4m3fn if dtype == "fp8e4m3fn" else torch.float8_e5m2
        return torch.from_numpy(array.view(np.uint8).copy()).view(kind).float()
    if dtype in ("uint16", "uint32", "uint64"):
        array = array.astype(np.int32 if dtype == "uint16" else np.int64)
    if not array.flags.writeable:
        array = array.copy()
    return torch.from_numpy(array).reshape(codes.shape).to(STORAGE[dtype])


def constant_tensor(constant: Constant) -> Tensor:
    """Converts a whole constant to a tensor."""
    return held(constant.codes(), constant.dtype)


def given_tensor(value: npt.ArrayLike, dtype: str, where: str) -> Tensor:
    """Converts a caller's input to the tensor that holds it here.

    Raises:
        DeviceError: the input holds floats where integers are needed, or does not hold numbers.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise DeviceError(f"{where} is {array.dtype}; it must be {dtype}")
    if array.dtype.kind == "f" and dtype not in FLOATS:
        raise DeviceError(f"{where} is {array.dtype}; it must be {dtype}: give it integers")
    if array.dtype.byteorder not in "=|<" or array.dtype == np.longdouble:
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    tensor = torch.from_numpy(np.array(array, copy=True, order="C"))
    return tensor.to(storage(dtype, where))


def outside(tensor: Tensor, dtype: str, precision: Precision) -> npt.NDArray[Any]:
    """Converts a result for the caller, to NumPy's type of MIL's name or else to float32.

    In `Precision.FP32` float16 results stay float32, because nothing was rounded to float16.
    """
    if dtype == "fp16" and precision is Precision.FP32:
        return tensor.detach().numpy().copy()
    array = tensor.detach().contiguous().numpy()
    return array.astype(_OUTSIDE.get(dtype, "f4"))
