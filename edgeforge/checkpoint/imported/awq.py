"""AWQ checkpoints (Lin et al. 2023), in the layout that AutoAWQ calls GEMM.

``qweight: int32[in, out / 8]`` packs codes along the OUTPUT, and ``qzeros: int32[groups, out / 8]``
packs zero points the same way. The eight nibbles of a word, the lowest first, are outputs 0, 2, 4,
6, 1, 3, 5, 7. ``scales`` is ``[groups, out]``. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.packing import (
    SCALES,
    Bits,
    PackedPart,
    groups_of,
    read_width,
    transposed,
    unpack_words,
)
from edgeforge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# Which nibble of a word holds each of eight neighbouring outputs.
_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)
_HARMLESS = (
    "backend",
    "do_fuse",
    "exllama_config",
    "format",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "modules_to_not_convert",
    "quant_method",
)


@dataclass(frozen=True)
class AwqPacking:
    """The layout of an AWQ checkpoint.

    Attributes:
        group_size: input columns that share a scale; None for one group per row.
        bits: bits of a code.
    """

    group_size: int | None
    bits: Bits = 4
    method: str = "awq"
    codes_part: ClassVar[str] = "qweight"
    scale_part: ClassVar[str] = "scales"
    zero_part: ClassVar[str] = "qzeros"
    index_part: ClassVar[str] = "g_idx"

    def parts(self, rows: int, columns: int) -> Mapping[str, PackedPart]:
        """As `edgeforge.checkpoint.imported.packing.Packing.parts`."""
        groups = groups_of(columns, self.group_size)
        return {
            "qweight": PackedPart((columns, rows // 8)),
            "qzeros": PackedPart((groups, rows // 8)),
            "scales": PackedPart((groups, rows), SCALES),
        }

    def codes(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.codes`."""
        from quant.formats.packing import pack_int4

        return pack_int4(_outputs_first(stored))

    def scale(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.scale`."""
        return transposed(stored)

    def zero_point(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.zero_point`."""
        return _outputs_first(stored)


def _outputs_first(words: torch.Tensor) -> torch.Tensor:
    """Unpacks nibbles and puts outputs in order: ``int32[n, out / 8] -> uint8[out, n]``."""
    nibbles = unpack_words(words, 4).reshape(len(words), -1, 8)
    return transposed(nibbles[:, :, list(_PLACE)].reshape(len(words), -1))


def read_awq(reader: ConfigReader) -> AwqPacking:
    """Reads an AWQ checkpoint's ``quantization_config``.

    Raises:
        CheckpointError: a field would change the weights and is not implemented.
    """
    for field in _HARMLESS:
        reader.get(field)
    old = reader.get("w_bit") is not None
    bits, size = read_width(reader, *(("w_bit", "q_group_size") if old else ("bits", "group_size")))
    if bits != 4:
        raise CheckpointError(f"{reader.where}: bits is {bits}; AWQ's layout is known for 4 only")
    reader.choice("version", ("gemm", "GEMM"), "gemm")
    if not reader.flag("zero_point", True):
        raise CheckpointError(
            f"{reader.where}: zero_point is false, which is a layout that EdgeForge does not read: "
            f"give the original checkpoint"
        )
    reader.finish()
    return AwqPacking(size)
