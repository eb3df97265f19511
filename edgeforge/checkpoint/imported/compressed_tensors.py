"""compressed-tensors checkpoints, as llm-compressor writes them: ``pack-quantized`` and FP8.

In the format ``float-quantized`` weights are 8-bit floats (`edgeforge.checkpoint.imported.fp8`). In
``pack-quantized``,
``weight_packed: int32[out, in * bits / 32]`` packs codes along the input, the lowest bits first;
``weight_scale`` is ``[out, groups]``; ``weight_zero_point: int32[out * bits / 32, groups]`` packs
along the output. Half of their range is added to signed integers and to zero points before they are
stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.fp8 import Fp8Layers, read_block
from edgeforge.checkpoint.imported.method import Method
from edgeforge.checkpoint.imported.packed_tensor import PackedLayers
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
from quant.quoted import quoted

if TYPE_CHECKING:
    import torch

_HARMLESS = (
    "global_compression_ratio",
    "ignore",
    "quant_method",
    "quantization_status",
    "transform_config",
    "version",
)
_OTHER_FORMATS = {
    "naive-quantized": "8-bit floats or integers, not packed",
    "int-quantized": "8-bit integers, not packed",
    "nvfp4-pack-quantized": "4-bit floats",
    "mxfp4-pack-quantized": "4-bit floats",
}
_WEIGHT_HARMLESS = ("actorder", "observer", "observer_kwargs")


@dataclass(frozen=True)
class CompressedPacking:
    """The layout of a ``pack-quantized`` checkpoint.

    Attributes:
        bits: bits of a code.
        group_size: input columns that share a scale; None for one group per row.
        symmetric: whether the checkpoint has no zero points.
    """

    bits: Bits
    group_size: int | None
    symmetric: bool
    method: str = "compressed-tensors"
    codes_part: ClassVar[str] = "weight_packed"
    scale_part: ClassVar[str] = "weight_scale"
    zero_part: ClassVar[str] = "weight_zero_point"
    index_part: ClassVar[str] = "weight_g_idx"

    def parts(self, rows: int, columns: int) -> Mapping[str, PackedPart]:
        """As `edgeforge.checkpoint.imported.packing.Packing.parts`."""
        groups = groups_of(columns, self.group_size)
        found = {
            "weight_packed": PackedPart((rows, -(-columns * self.bits // 32))),
            "weight_scale": PackedPart((rows, groups), SCALES),
            "weight_shape": PackedPart((2,), ("int64", "int32"), required=False),
            "weight_g_idx": PackedPart((columns,), required=False),
        }
        if not self.symmetric:
            packed = -(-rows * self.bits // 32)
            found["weight_zero_point"] = PackedPart((packed, groups))
        return found

    def codes(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the words' bytes, which are already in the store's order."""
        import torch

        return stored.view(torch.uint8)

    def scale(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.scale`."""
        return stored

    def zero_point(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.zero_point`."""
        return transposed(unpack_words(transposed(stored), self.bits))


def read_compressed_tensors(reader: ConfigReader) -> Method:
    """Reads a compressed-tensors checkpoint's ``quantization_config``.

    Raises:
        CheckpointError: a field would change the weights and is not implemented.
    """
    for field in _HARMLESS:
        reader.get(field)
    stored = reader.get("format", "dense")
    floats = stored == "float-quantized"
    if stored != "pack-quantized" and not floats:
        kind = _OTHER_FORMATS.get(str(stored))
        what = "" if kind is None else f" ({kind})"
        raise CheckpointError(
            f"{reader.where} sets format to {str(stored)[:60]!r}{what}; EdgeForge imports "
            f"'pack-quantized' and 'float-quantized': give the original checkpoint, in bfloat16, "
            f"float16 or float32"
        )
    reader.absent("kv_cache_scheme", "sparsity_config")
    groups = reader.section("config_groups")
    names = sorted(groups.fields()) if groups is not None else []
    group = groups.section(names[0]) if groups is not None and len(names) == 1 else None
    weights = group.section("weights") if group is not None else None
    if group is None or weights is None:
        raise CheckpointError(
            f"{reader.where} has {len(names)} config_groups; EdgeForge reads checkpoints with one "
            f"that has a field 'weights'"
        )
    if floats:
        group.get("input_activations")  # for kernels that round them too
    else:
        group.absent("input_activations")
    group.absent("output_activations")
    if group.get("targets") != ["Linear"]:
        raise CheckpointError(
            f"{group.where}: targets is {quoted(group.get('targets'))}; EdgeForge reads ['Linear']"
        )
    group.choice("format", (str(stored),), str(stored))
    group.finish()
    for field in _WEIGHT_HARMLESS:
        weights.get(field)
    if floats:
        found = _read_floats(weights)
        reader.finish()
        return found
    weights.get("block_structure")
    strategy = weights.choice("strategy", ("group", "channel"), "channel")
    bits, size = read_width(weights, "num_bits", "group_size")
    weights.choice("type", ("int",), "int")
    weights.absent("dynamic")
    symmetric = weights.flag("symmetric", True)
    weights.finish()
    reader.finish()
    packing = CompressedPacking(bits, size if strategy == "group" else None, symmetric)
    return PackedLayers(packing)


def _read_floats(weights: ConfigReader) -> Fp8Layers:
    """Reads how weights of 8-bit floats are scaled."""
    strategy = weights.choice("strategy", ("tensor", "channel", "block"), "tensor")
    given = weights.get("block_structure")
    weights.require("num_bits", 8)
    weights.require("group_size", None)
    weights.choice("type", ("float",), "float")
    weights.require("symmetric", True)
    weights.absent("dynamic")
    for field in ("scale_dtype", "zp_dtype"):
        weights.get(field)
    weights.finish()
    block = read_block(given, f"{weights.where}: block_structure") if strategy == "block" else None
    return Fp8Layers("compressed-tensors", "weight_scale", block)
