"""GPTQ checkpoints (Frantar et al. 2022), as AutoGPTQ, GPTQModel and optimum write them.

``qweight: int32[in * bits / 32, out]`` packs codes along the INPUT, the lowest bits first;
``qzeros: int32[groups, out * bits / 32]`` packs zero points along the output; ``scales`` is
``[groups, out]`` and ``g_idx: int32[in]`` names the group of each input column. The format
``gptq`` stores zero points minus one; the format ``gptq_v2`` stores them as they are.
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

if TYPE_CHECKING:
    import torch

# Fields about how the integers were found or which kernels run them. None changes the weights.
_HARMLESS = (
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "cache_examples_on_gpu",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "desc_act",  # it changes the order of groups, which is read from g_idx
    "disable_exllama",
    "exllama_config",
    "format",
    "hyb_act",
    "lm_head",
    "max_input_length",
    "meta",
    "method",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "offload_to_disk",
    "offload_to_disk_path",
    "pack_impl",
    "quant_method",
    "quantizer",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
)


@dataclass(frozen=True)
class GptqPacking:
    """The layout of a GPTQ checkpoint.

    Attributes:
        bits: bits of a code.
        group_size: input columns that share a scale; None for one group per row.
        symmetric: whether the checkpoint says that every zero point is the middle of the range.
        minus_one: whether the format stores zero points minus one.
    """

    bits: Bits
    group_size: int | None
    symmetric: bool
    minus_one: bool
    method: str = "gptq"
    codes_part: ClassVar[str] = "qweight"
    scale_part: ClassVar[str] = "scales"
    zero_part: ClassVar[str] = "qzeros"
    index_part: ClassVar[str] = "g_idx"

    def parts(self, rows: int, columns: int) -> Mapping[str, PackedPart]:
        """As `edgeforge.checkpoint.imported.packing.Packing.parts`."""
        groups = groups_of(columns, self.group_size)
        return {
            "qweight": PackedPart((columns * self.bits // 32, rows)),
            "qzeros": PackedPart((groups, rows * self.bits // 32)),
            "scales": PackedPart((groups, rows), SCALES),
            "g_idx": PackedPart((columns,), required=False),
        }

    def codes(self, stored: torch.Tensor) -> torch.Tensor:
        """Returns the transposed words as bytes: a column of words is a row of the store."""
        import torch

        return transposed(stored).view(torch.uint8)

    def scale(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.scale`."""
        return transposed(stored)

    def zero_point(self, stored: torch.Tensor) -> torch.Tensor:
        """As `edgeforge.checkpoint.imported.packing.Packing.zero_point`."""
        points = transposed(unpack_words(stored, self.bits))
        middle, largest = 1 << (self.bits - 1), (1 << self.bits) - 1
        # Some tools store zero points as they are and still name the older format, which stores
        # them minus one. A symmetric checkpoint shows it: its zero points must be the middle.
        as_they_are = not self.minus_one or (self.symmetric and bool((points == middle).all()))
        if as_they_are:
            return points
        if bool((points == largest).any()):
            raise ValueError(
                f"a zero point is stored as {largest}, which some readers of the format 'gptq' "
                f"take for {largest + 1} and some for 0: save the checkpoint again with "
                f"checkpoint_format 'gptq_v2'"
            )
        return points + 1


def read_gptq(reader: ConfigReader) -> GptqPacking:
    """Reads a GPTQ checkpoint's ``quantization_config``.

    Raises:
        CheckpointError: a field would change the weights and is not implemented.
    """
    for field in _HARMLESS:
        reader.get(field)
    bits, size = read_width(reader, "bits", "group_size")
    reader.absent("is_marlin_format", "dynamic")
    reader.choice("pack_dtype", ("int32",), "int32")
    form = reader.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    symmetric = reader.flag("sym", False)
    reader.finish()
    return GptqPacking(bits, size, symmetric, minus_one=form == "gptq")
