"""The tensors of a GGUF file: Q4_0 and Q8_0 as integers, all others as floats.

A block of Q8_0 is a scale, ``float16``, and 32 signed bytes. A block of Q4_0 is a scale and 16
bytes of codes with the zero point 8: the low halves are its first 16 columns, the high halves the
last. A scale of Q4_0 may be below zero. Then ``(code - 8) * scale`` is
``(15 - code - 7) * -scale``: codes are turned round, and the zero point is 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeforge.checkpoint.gguf.source import StoredRows
from edgeforge.checkpoint.gguf.tensor_types import Q4_0, Q8_0, decode
from edgeforge.checkpoint.imported.integer_tensor import ALL, IntegerTensor
from edgeforge.errors import CheckpointError
from quant.formats.formats import IntFormat

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GgufTensors:
    """Reads a GGUF file's tensors.

    Attributes:
        rows: how each tensor is stored, by transformers' name.
    """

    rows: Mapping[str, StoredRows]
    method: ClassVar[str] = "GGUF"
    sign: ClassVar[str] = "*"

    def __repr__(self) -> str:
        return f"GgufTensors({sorted((name, repr(rows)) for name, rows in self.rows.items())})"

    def find(
        self, checkpoint: Checkpoint, tensor: str, shape: tuple[int, ...]
    ) -> IntegerTensor | DecodedTensor | None:
        """As `edgeforge.checkpoint.imported.method.Method.find`."""
        rows, entry = self.rows.get(tensor), checkpoint.tensors.get(tensor)
        if rows is None or entry is None or entry.shape != shape:
            return None
        if rows.heads and (not shape[0] or shape[0] % (2 * rows.heads)):
            raise CheckpointError(
                f"{tensor} has {shape[0]} rows, which {rows.heads} heads do not share in pairs"
            )
        if rows.kind in (Q4_0, Q8_0) and len(shape) == 2 and not rows.one_added:
            return _Blocks(checkpoint, tensor, rows)
        if rows.kind.name in _FLOATS and not rows.heads and not rows.one_added:
            return None
        return _Decoded(checkpoint, tensor, rows)

    def as_floats(self, tensor: IntegerTensor) -> DecodedTensor:
        """As `edgeforge.checkpoint.imported.method.DecodableMethod.as_floats`."""
        assert isinstance(tensor, _Blocks)
        return _Decoded(tensor.checkpoint, tensor.name, tensor.stored)

    def notes(self) -> tuple[str, ...]:
        """As `edgeforge.checkpoint.imported.method.Method.notes`."""
        return ()


def _read_blocks(
    checkpoint: Checkpoint, name: str, stored: StoredRows, start: int, stop: int
) -> NDArray[np.uint8]:
    """Returns the bytes of rows in transformers' order, ``uint8[rows, bytes]``."""
    import numpy as np

    entry = checkpoint.tensors[name]
    columns = entry.shape[-1] if len(entry.shape) > 1 else 1
    stride = columns // stored.kind.values * stored.kind.nbytes
    if len(entry.shape) == 1 and stored.kind.values > 1:
        raise CheckpointError(f"{name} is a vector of {stored.kind.name}: the file is damaged")
    if not stored.heads:
        return checkpoint.read_bytes(name, start * stride, stop * stride).reshape(-1, stride)
    # Rows that are rotated together lie side by side within a head: whole heads are read.
    width = entry.shape[0] // stored.heads
    first, last = start // width, -(-stop // width)
    read = checkpoint.read_bytes(name, first * width * stride, last * width * stride)
    pairs = read.reshape(last - first, width // 2, 2, stride)
    ordered = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1, stride)
    return ordered[start - first * width : stop - first * width]


class _Blocks(IntegerTensor):
    """A matrix of Q4_0 or Q8_0."""

    def __init__(self, checkpoint: Checkpoint, name: str, stored: StoredRows) -> None:
        rows, columns = checkpoint.tensors[name].shape
        super().__init__(name, (rows, columns), 4 if stored.kind == Q4_0 else 8, 32)
        self.checkpoint, self.stored = checkpoint, stored

    @property
    def form(self) -> str:
        """As `IntegerTensor.form`."""
        return self.stored.kind.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `IntegerTensor.tensors`."""
        return (self.name,)

    def format(self) -> IntFormat:
        """As `IntegerTensor.format`; no block is read, for both types have one format."""
        return IntFormat(self.bits, 32, symmetric=self.bits == 8, scale_dtype="float16")

    def codes(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.codes`."""
        import torch

        from quant.formats.packing import pack_int4

        scales, data = self._parts(rows)
        if self.bits == 8:
            codes = torch.from_numpy(data).view(torch.uint8) ^ 128
            codes = torch.where((scales == 0)[..., None], 128, codes)
            return codes.to(torch.uint8).reshape(len(codes), -1)
        packed = torch.from_numpy(data)
        codes = torch.cat((packed & 15, packed >> 4), dim=-1)
        codes = torch.where((scales < 0)[..., None], 15 - codes, codes)
        codes = torch.where((scales == 0)[..., None], 8, codes).to(torch.uint8)
        return pack_int4(codes.reshape(len(codes), -1))

    def scale(self, rows: slice = ALL) -> torch.Tensor:
        """As `IntegerTensor.scale`; a block of zeros, whose scale is 0, gets another."""
        import torch

        scales, _ = self._parts(rows)
        if not bool(scales.isfinite().all()):
            raise CheckpointError(
                f"{self.name} holds a scale that is no finite number: the file is damaged"
            )
        # The smallest normal number: with codes at the zero point, any scale means zeros.
        least = torch.tensor(torch.finfo(torch.float16).tiny, dtype=torch.float16)
        return torch.where(scales == 0, least, scales.abs())

    def zero_point(self, rows: slice = ALL) -> torch.Tensor | None:
        """As `IntegerTensor.zero_point`."""
        import torch

        scales, _ = self._parts(rows)
        if self.bits == 8:
            if bool((scales < 0).any()):
                raise CheckpointError(f"{self.name} holds a scale below zero: the file is damaged")
            return None
        return torch.where(scales < 0, 7, 8).to(torch.uint8)

    def _parts(self, rows: slice) -> tuple[torch.Tensor, NDArray[np.uint8]]:
        """Returns scales, ``float16[rows, groups]``, and bytes, ``uint8[rows, groups, bytes]``."""
        import numpy as np
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        read = _read_blocks(self.checkpoint, self.name, self.stored, start, stop)
        blocks = read.reshape(stop - start, self.shape[1] // 32, self.stored.kind.nbytes)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        return torch.from_numpy(scales.copy()), np.ascontiguousarray(blocks[..., 2:])


@dataclass(frozen=True)
class _Decoded:
    """A tensor of another type, or one whose rows or values llama.cpp changed."""

    checkpoint: Checkpoint
    name: str
    stored: StoredRows

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `DecodedTensor.tensors`."""
        return (self.name,)

    @property
    def dtype(self) -> str:
        """As `DecodedTensor.dtype`."""
        kind = self.stored.kind
        return kind.dtype if kind.name in _FLOATS and not self.stored.one_added else "float32"

    @property
    def form(self) -> str | None:
        """As `DecodedTensor.form`."""
        return None if self.stored.kind.name in _FLOATS else self.stored.kind.name

    def read(self, start: int, stop: int) -> torch.Tensor:
        """As `DecodedTensor.read`."""
        import torch

        kind = self.stored.kind
        blocks = _read_blocks(self.checkpoint, self.name, self.stored, start, stop)
        shape = (stop - start, *self.checkpoint.tensors[self.name].shape[1:])
        if kind.name in _FLOATS:
            found = torch.from_numpy(blocks.copy()).view(getattr(torch, kind.dtype))
        elif kind in (Q4_0, Q8_0) and len(shape) == 2:
            whole = _Blocks(self.checkpoint, self.name, self.stored)
            found = whole.dequantize(slice(start, stop))
        else:
            found = torch.from_numpy(decode(kind, blocks))
        found = found.reshape(shape)
        if self.stored.one_added:
            found = found.float() - 1
        if not bool(found.isfinite().all()):
            raise CheckpointError(
                f"{self.name} holds {kind.name} values that are no finite numbers: the file is "
                f"damaged"
            )
        return found
