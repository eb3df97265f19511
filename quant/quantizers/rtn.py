"""Round to nearest, with the best representable scale of every group.

For each group of weights ``w`` the quantizer minimizes ``sum(h * (w - scale * q) ** 2)`` over the
bfloat16 scales, where ``q = clamp(round_half_even(w / scale))``, and over the zero points when the
format is asymmetric. ``h`` grows with ``|w|`` for 4 bits in groups and is 1 otherwise
(`quant.kernels.native.is_weighted`). It quantizes every row on its own, so callers may cut a matrix
into chunks of rows and give each chunk to a thread.

The arithmetic exists twice, in the same float32 operations: in ``quant/kernels/_kernels.c``, and in
``quant/quantizers/rtn_torch.py`` for machines without a compiler. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from quant.errors import QuantizationError
from quant.formats.formats import IntFormat
from quant.kernels import native
from quant.quantizers import rtn_torch
from quant.quantizers.row_checks import matrix_size, refusal

Backend = Literal["native", "torch"]
Buffer = torch.Tensor | npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class RowErrors:
    """The error of quantizing some rows.

    Attributes:
        squared_error: Sum of ``(weight - stored value) ** 2``.
        squared_norm: Sum of ``weight ** 2``.
    """

    squared_error: float
    squared_norm: float


@dataclass(frozen=True)
class QuantizedRows:
    """The stored parts of some rows, and the error of their stored values.

    Attributes:
        codes: uint8 ``[rows, cols * bits / 8]``.
        scale: bfloat16 ``[rows, groups]``.
        zero_point: uint8 ``[rows, ceil(groups * bits / 8)]``, or None when symmetric.
        squared_error: Sum of ``(weight - stored value) ** 2``.
        squared_norm: Sum of ``weight ** 2``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    squared_error: float
    squared_norm: float

    @classmethod
    def joined(cls, parts: Sequence[QuantizedRows]) -> QuantizedRows:
        """Joins parts of one matrix, given in the order of its rows."""
        points = [part.zero_point for part in parts if part.zero_point is not None]
        return cls(
            codes=torch.cat([part.codes for part in parts]),
            scale=torch.cat([part.scale for part in parts]),
            zero_point=torch.cat(points) if points else None,
            squared_error=sum(part.squared_error for part in parts),
            squared_norm=sum(part.squared_norm for part in parts),
        )


class RoundToNearest:
    """The quantizer ``rtn``: no calibration data, one pass over the weights."""

    name: Final = "rtn"

    def quantize_rows(
        self,
        weight: torch.Tensor,
        fmt: IntFormat,
        *,
        name: str = "",
        first_row: int = 0,
        backend: Backend | None = None,
    ) -> QuantizedRows:
        """Quantizes rows of a weight matrix.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The integer format to store.
            name: The weight's name, for messages.
            first_row: Index of the first of these rows in the whole weight, for messages.
            backend: ``native`` or ``torch`` to require one implementation (they agree bit for
                bit); None takes the native one where it was built.

        Raises:
            QuantizationError: When the shape does not suit the format, or a weight is NaN,
                infinite, or so large that its scale would not be finite in float16.
        """
        rows, cols = matrix_size(weight)
        fmt.check(name or "weight", rows, cols)
        parts = {
            part: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype))
            for part, layout in fmt.layout(rows, cols).items()
        }
        codes, scale, zero_point = parts["codes"], parts["scale"], parts.get("zero_point")
        cost = self.quantize_rows_into(
            weight, fmt, codes, scale, zero_point, name=name, first_row=first_row, backend=backend
        )
        return QuantizedRows(codes, scale, zero_point, cost.squared_error, cost.squared_norm)

    def quantize_rows_into(
        self,
        weight: torch.Tensor,
        fmt: IntFormat,
        codes: Buffer,
        scale: Buffer,
        zero_point: Buffer | None = None,
        *,
        name: str = "",
        first_row: int = 0,
        backend: Backend | None = None,
    ) -> RowErrors:
        """Quantizes rows into buffers of the caller, such as views of a larger chunk.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The integer format to store.
            codes: Contiguous uint8 ``[rows, cols * bits / 8]``, torch or numpy.
            scale: Contiguous ``[rows, groups]``: bfloat16 in torch, or uint16 in torch or numpy,
                which receives the bfloat16 bits.
            zero_point: Contiguous uint8 ``[rows, ceil(groups * bits / 8)]``; None when symmetric.
            name: The weight's name, for messages.
            first_row: Index of the first of these rows in the whole weight, for messages.
            backend: As in ``quantize_rows``.

        Raises:
            QuantizationError: As in ``quantize_rows``, or a buffer does not have the part's dtype
                and shape.
        """
        rows, cols = matrix_size(weight)
        label = name or "weight"
        fmt.check(label, rows, cols)
        layout = fmt.layout(rows, cols)
        code_part = _buffer(codes, "codes", layout["codes"].shape, torch.uint8)
        scale_part = _buffer(scale, "scale", layout["scale"].shape, torch.bfloat16)
        zero_part = None
        if not fmt.symmetric:
            if zero_point is None:
                raise QuantizationError(f"{label}: {fmt.name} needs a zero_point buffer")
            zero_part = _buffer(zero_point, "zero_point", layout["zero_point"].shape, torch.uint8)
        weight = weight.detach().contiguous()
        if backend is None:
            backend = "native" if native.available() else "torch"
        if backend == "native":
            outcome = native.quantize_rows(weight, fmt, code_part, scale_part, zero_part)
        else:
            outcome = rtn_torch.quantize_rows(weight, fmt, code_part, scale_part, zero_part)
        if outcome.bad_row is not None:
            raise refusal(weight[outcome.bad_row], fmt, label, first_row + outcome.bad_row)
        return RowErrors(outcome.squared_error, outcome.squared_norm)


RTN: Final = RoundToNearest()


def _buffer(buffer: Buffer, part: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    tensor = buffer if isinstance(buffer, torch.Tensor) else torch.from_numpy(buffer)
    if dtype == torch.bfloat16 and tensor.dtype == torch.uint16:
        tensor = tensor.view(torch.bfloat16)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "strided"
        raise QuantizationError(
            f"the {part} buffer is {layout} {tensor.dtype} {list(tensor.shape)}; "
            f"it must be contiguous {dtype} {list(shape)}"
        )
    return tensor
