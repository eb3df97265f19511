"""The compiled kernels of ``_blocks.c``: packed integers as floats, and products with them.

They hold what Core ML stores: integers of 1 to 8 bits, low bits first, with a scale (and an offset)
a group of columns, or with look-up tables shared by some rows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

_ROWS: Final = 64  # fewer are not worth a thread of their own


@dataclass(frozen=True)
class Blocks:
    """A matrix of packed integers and what they stand for.

    Attributes:
        packed: uint8 ``[ceil(rows * cols * bits / 8)]``.
        bits: of an integer, 1 to 8.
        signed: whether integers are two's complement.
        rows: of the matrix.
        cols: of the matrix.
        scale: float32 ``[rows, groups]``; or the tables, float32 ``[rows / table_rows, 2**bits]``.
        offset: float32 ``[rows, groups]``, or None for zero.
        table_rows: rows that share a table; 0 when there are scales.
        half: whether each float is rounded to float16.
    """

    packed: npt.NDArray[np.uint8]
    bits: int
    signed: bool
    rows: int
    cols: int
    scale: torch.Tensor
    offset: torch.Tensor | None = None
    table_rows: int = 0
    half: bool = False

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """Rows as float32 ``[stop - start, cols]``: ``scale * (integer - offset)``, or entries."""
        out = torch.empty(stop - start, self.cols)

        def work(first: int, last: int) -> None:
            codes = np.empty(self.cols, np.uint8)
            place = out.data_ptr() + 4 * (first - start) * self.cols
            _loaded().edgeforge_block_rows(
                ctypes.byref(self._message), first, last, codes.ctypes.data, place
            )

        _over_rows(work, start, stop)
        return out

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` float32 ``[n, cols]`` by the matrix: float32 ``[n, rows]``, for a small ``n``."""
        given, out = x.contiguous(), torch.empty(x.shape[0], self.rows)

        def work(first: int, last: int) -> None:
            codes, values = np.empty(self.cols, np.uint8), np.empty(self.cols, np.float32)
            _loaded().edgeforge_block_product(
                ctypes.byref(self._message),
                first,
                last,
                given.data_ptr(),
                len(given),
                codes.ctypes.data,
                values.ctypes.data,
                out.data_ptr(),
                self.rows,
            )

        _over_rows(work, 0, self.rows)
        return out

    @functools.cached_property
    def _message(self) -> _Message:
        groups = self.scale.shape[-1]
        return _Message(
            packed=self.packed.ctypes.data,
            scale=self.scale.data_ptr(),
            offset=None if self.offset is None else self.offset.data_ptr(),
            cols=self.cols,
            group=self.cols // (1 if self.table_rows else groups),
            table_rows=self.table_rows,
            bits=self.bits,
            is_signed=int(self.signed),
            half=int(self.half),
        )


class _Message(ctypes.Structure):
    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("cols", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("table_rows", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("is_signed", ctypes.c_int32),
        ("half", ctypes.c_int32),
    )


def available() -> bool:
    """Whether the kernels were built when EdgeForge was installed."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("quant.kernels._kernels")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    if not hasattr(library, "edgeforge_block_product"):  # built before these kernels were written
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.edgeforge_block_rows.restype = None
    library.edgeforge_block_rows.argtypes = [pointer, number, number, pointer, pointer]
    library.edgeforge_block_product.restype = None
    library.edgeforge_block_product.argtypes = [
        *(pointer, number, number, pointer, number, pointer, pointer, pointer, number),
    ]
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "callers ask available() first"
    return library


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "blocks")


def _over_rows(work: Any, start: int, stop: int) -> None:
    """Calls ``work(first, last)`` over stretches of rows, one for each of PyTorch's threads."""
    threads = min(torch.get_num_threads(), max(1, (stop - start) // _ROWS))
    if threads == 1:
        work(start, stop)
        return
    step = -(-(stop - start) // threads)
    ends = [(first, min(stop, first + step)) for first in range(start, stop, step)]
    list(_pool(threads).map(lambda pair: work(*pair), ends))
