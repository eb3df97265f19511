"""`Packing`: the layout of a quantized linear layer in the checkpoints of one method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

if TYPE_CHECKING:
    import torch

Bits = Literal[4, 8]
SCALES = ("float16", "bfloat16", "float32")
INT32 = ("int32",)


@dataclass(frozen=True)
class PackedPart:
    """One of the tensors that make up a packed layer.

    Attributes:
        shape: the tensor's shape in the checkpoint.
        dtypes: the dtypes that it may have.
        required: whether every layer must have it.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = INT32
    required: bool = True


class Packing(Protocol):
    """A method's layout of linear layers; a layer has ``rows`` outputs and ``columns`` inputs.

    The names of a layer's tensors are its module's name, a dot, and one of the parts below.

    Attributes:
        codes_part: the tensor of codes; a module that has it is packed.
        scale_part: the tensor of scales.
        zero_part: the tensor of zero points.
        index_part: the tensor that says which group each input column belongs to.
    """

    codes_part: ClassVar[str]
    scale_part: ClassVar[str]
    zero_part: ClassVar[str]
    index_part: ClassVar[str]

    @property
    def method(self) -> str:
        """The checkpoint's ``quant_method``."""

    @property
    def bits(self) -> Bits:
        """Bits of a code."""

    @property
    def group_size(self) -> int | None:
        """Input columns that share a scale; None for one group per row."""

    def parts(self, rows: int, columns: int) -> Mapping[str, PackedPart]:
        """Returns a layer's tensors by part name: what follows the module's name and a dot."""

    def codes(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the codes in the store's layout, ``uint8[rows, columns * bits / 8]``."""

    def scale(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the scales as ``[rows, groups]`` in the checkpoint's dtype."""

    def zero_point(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the zero points as ``uint8[rows, groups]``, unpacked.

        Raises:
            ValueError: readers of the format do not agree on a zero point's value; the message
                says which value.
        """


def read_width(reader: ConfigReader, bits_field: str, group_field: str) -> tuple[Bits, int | None]:
    """Reads the bits of a code and the group size.

    Args:
        reader: the reader of ``quantization_config``.
        bits_field: name of the field with the bits.
        group_field: name of the field with the group size; -1 stands for one group per row.

    Returns:
        The bits, and the group size or None for one group per row.

    Raises:
        CheckpointError: EdgeForge does not store this width or group size.
    """
    bits = reader.integer(bits_field)
    size = reader.get(group_field, -1)
    if bits not in (4, 8):
        raise CheckpointError(
            f"{reader.where}: {bits_field} is {bits}; EdgeForge imports integers of 4 and 8 bits: "
            f"give the original checkpoint"
        )
    if isinstance(size, int) and not isinstance(size, bool):
        if size == -1:
            return (4 if bits == 4 else 8), None
        if size >= 2 and size % 2 == 0:
            return (4 if bits == 4 else 8), size
    raise CheckpointError(
        f"{reader.where}: {group_field} is {quoted(size)}, neither -1 nor an even number of columns"
    )


def groups_of(columns: int, group_size: int | None) -> int:
    """Returns the number of groups in a row."""
    return 1 if group_size is None else -(-columns // group_size)


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous copy of the transpose, with standard strides for one row or column."""
    import torch

    return matrix.t().clone(memory_format=torch.contiguous_format)


def unpack_words(words: torch.Tensor, bits: Bits) -> torch.Tensor:
    """Unpacks the codes of 32-bit words along the last axis, the lowest bits first.

    ``int32[..., n] -> uint8[..., n * 32 / bits]``.
    """
    import torch

    apart = words.view(torch.uint8)
    if bits == 8:
        return apart
    pairs = torch.stack((apart & 15, apart >> 4), dim=-1)
    return pairs.reshape(*apart.shape[:-1], -1)
