"""The types of a GGUF file's tensors: values in blocks along a row, and how they become floats.

Floats, Q4_0 and Q8_0 are read here; the package ``gguf`` of llama.cpp's authors decodes the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgeforge.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INSTALL: Final = "pip install 'edgeforge[gguf]'"


@dataclass(frozen=True, slots=True)
class TensorType:
    """A type of tensor.

    Attributes:
        number: its number in files.
        name: ggml's name, such as ``Q4_K``.
        values: values of a block.
        nbytes: bytes of a block.
    """

    number: int
    name: str
    values: int
    nbytes: int

    @property
    def dtype(self) -> str:
        """Its name in `edgeforge.checkpoint.tensor_entry.TensorEntry`."""
        return _FLOATS.get(self.name, self.name)


_FLOATS: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Q4_0: Final = TensorType(2, "Q4_0", 32, 18)
Q8_0: Final = TensorType(8, "Q8_0", 32, 34)
_OWN: Final = {
    kind.number: kind
    for kind in (
        TensorType(0, "F32", 1, 4),
        TensorType(1, "F16", 1, 2),
        TensorType(30, "BF16", 1, 2),
        Q4_0,
        Q8_0,
    )
}


def find_type(number: int, where: str) -> TensorType:
    """Returns a tensor's type by its number in the file.

    Args:
        number: the number.
        where: the tensor, for messages.

    Raises:
        CheckpointError: there is no such type, it is no type of weights, or the package ``gguf`` is
            needed and not installed.
    """
    if number in _OWN:
        return _OWN[number]
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise CheckpointError(
            f"{where} has the type {number} of ggml, which the package gguf decodes, and it is not "
            f"installed: {INSTALL}"
        ) from None
    try:
        kind = GGMLQuantizationType(number)
        found = TensorType(number, kind.name, *GGML_QUANT_SIZES[kind])
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{where} has the type {number}, which the installed package gguf does not know: the "
            f"file is damaged, or newer than the package"
        ) from None
    _probe(found, where)
    return found


def _probe(kind: TensorType, where: str) -> None:
    """Refuses a type of which the package cannot decode a block.

    Raises:
        CheckpointError: names the tensor and its type.
    """
    import numpy as np

    try:
        values = decode(kind, np.zeros((1, kind.nbytes), np.uint8))
    except (NotImplementedError, ValueError):
        values = None
    if values is None or values.shape != (1, kind.values):
        raise CheckpointError(
            f"{where} is {kind.name}, which is no type of weights that the package gguf decodes: "
            f"give a file with other types, such as Q4_0, Q8_0 or F16"
        )


def decode(kind: TensorType, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Returns the values of rows of blocks: ``uint8[rows, bytes] -> float32[rows, columns]``."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    found: NDArray[np.float32] = dequantize(blocks, GGMLQuantizationType(kind.number))
    return found
