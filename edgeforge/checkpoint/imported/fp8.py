"""Checkpoints of 8-bit floats, FP8: ``float8_e4m3fn`` times scales, read as floats.

Scales are one for a tensor, one for a row, or one for each block of rows and columns. The writers
differ in the name of the scales: ``weight_scale_inv`` (DeepSeek, Qwen, Mistral; it is a multiplier
in spite of its name) or ``weight_scale`` (compressed-tensors, FBGEMM). What they say about
activations is for kernels that round those to FP8 as well, which EdgeForge does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.integer_tensor import IntegerTensor
from edgeforge.checkpoint.imported.packing import SCALES
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor

_DTYPE: Final = "float8_e4m3fn"
# Scales of activations, and their bounds: nothing that a weight is made of.
_ACTIVATIONS: Final = ("input_scale", "activation_scale", "input_scale_ub", "output_scale")
_HARMLESS: Final = (
    "activation_scale_ub",
    "activation_scheme",
    "dequantize",
    "ignored_layers",
    "kv_cache_quant_algo",
    "modules_to_not_convert",
    "quant_method",
)


@dataclass(frozen=True)
class Fp8Layers:
    """The matrices of an FP8 checkpoint.

    Attributes:
        method: the checkpoint's ``quant_method``.
        scale_part: name of the scales, after the module's.
        block: rows and columns that share a scale; None for one a tensor or one a row.
    """

    method: str
    scale_part: str
    block: tuple[int, int] | None = None

    @property
    def sign(self) -> str:
        """As `edgeforge.checkpoint.imported.method.Method.sign`."""
        return f"*.{self.scale_part}"

    def find(
        self, checkpoint: Checkpoint, tensor: str, shape: tuple[int, ...]
    ) -> IntegerTensor | DecodedTensor | None:
        """As `edgeforge.checkpoint.imported.method.Method.find`."""
        entry = checkpoint.tensors.get(tensor)
        if entry is None or len(shape) == 1 or not entry.dtype.startswith("float8"):
            return None
        if entry.dtype != _DTYPE:
            raise CheckpointError(
                f"{tensor} is {entry.dtype}; of 8-bit floats EdgeForge reads {_DTYPE}: give the "
                f"original checkpoint, in bfloat16, float16 or float32"
            )
        scales = f"{tensor.removesuffix('.weight')}.{self.scale_part}"
        held = checkpoint.tensors.get(scales)
        if held is None:
            raise CheckpointError(f"the checkpoint lacks {scales}, the scales of {tensor}")
        wanted = self._shapes(*shape)
        if entry.shape != shape or held.shape not in wanted or held.dtype not in SCALES:
            raise CheckpointError(
                f"{scales} is {held.dtype} {list(held.shape)} and {tensor} {list(entry.shape)}; "
                f"config.json calls for scales of {' or '.join(str(list(s)) for s in wanted)} and "
                f"weights of {list(shape)}"
            )
        return _Fp8Tensor(checkpoint, tensor, scales, self.block)

    def _shapes(self, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        if self.block is not None:
            return ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        return ((), (1,), (1, 1), (rows, 1), (rows,))

    def notes(self) -> tuple[str, ...]:
        """As `edgeforge.checkpoint.imported.method.Method.notes`."""
        return ("FP8 weights were multiplied by their scales; activations are not rounded to FP8",)


@dataclass(frozen=True)
class _Fp8Tensor:
    """A matrix of 8-bit floats."""

    checkpoint: Checkpoint
    name: str
    scales: str
    block: tuple[int, int] | None
    dtype: ClassVar[str] = "float32"

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `DecodedTensor.tensors`."""
        module = self.name.removesuffix(".weight")
        others = (f"{module}.{part}" for part in _ACTIVATIONS)
        return (self.name, self.scales, *(n for n in others if n in self.checkpoint.tensors))

    @property
    def form(self) -> str | None:
        """As `DecodedTensor.form`."""
        if self.block is not None:
            return f"FP8 with scales of {self.block[0]} x {self.block[1]} blocks"
        one = self.checkpoint.tensors[self.scales].shape in ((), (1,), (1, 1))
        return "FP8 with one scale a tensor" if one else "FP8 with one scale a row"

    def read(self, start: int, stop: int) -> torch.Tensor:
        """As `DecodedTensor.read`."""
        import torch

        columns = self.checkpoint.tensors[self.name].shape[1]
        read = self.checkpoint.read_bytes(self.name, start * columns, stop * columns)
        values = torch.from_numpy(read).view(torch.float8_e4m3fn).float().reshape(-1, columns)
        values *= self._scale(start, stop, columns)
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self.name} or its scales hold values that are no finite numbers: the checkpoint "
                f"is damaged"
            )
        return values

    def _scale(self, start: int, stop: int, columns: int) -> torch.Tensor:
        """Returns the scales of rows, which multiply ``[rows, columns]``."""
        import torch

        held = torch.from_numpy(self.checkpoint.read(self.scales))
        if self.checkpoint.tensors[self.scales].dtype == "bfloat16":
            held = held.view(torch.bfloat16)
        scales = held.float()
        if self.block is None:
            return (
                scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(-1, 1)[start:stop]
            )
        rows = torch.arange(start, stop) // self.block[0]
        return scales[rows].repeat_interleave(self.block[1], dim=1)[:, :columns]


def read_fp8(reader: ConfigReader) -> Fp8Layers:
    """Reads an FP8 checkpoint's ``quantization_config``, as DeepSeek's and Mistral's files have it.

    Raises:
        CheckpointError: a field would change the weights and is not implemented.
    """
    _read_harmless(reader)
    reader.choice("fmt", ("e4m3",), "e4m3")
    given = reader.get("weight_block_size")
    block = None if given is None else read_block(given, reader.where)
    reader.finish()
    return Fp8Layers("fp8", "weight_scale_inv", block)


def read_fbgemm(reader: ConfigReader) -> Fp8Layers:
    """Reads a checkpoint's ``quantization_config`` that FBGEMM's kernels were made for.

    Raises:
        CheckpointError: a field would change the weights and is not implemented.
    """
    _read_harmless(reader)
    reader.finish()
    return Fp8Layers("fbgemm_fp8", "weight_scale")


def _read_harmless(reader: ConfigReader) -> None:
    for field in _HARMLESS:
        reader.get(field)


def read_block(given: object, where: str) -> tuple[int, int]:
    """Returns the rows and columns of a block.

    Raises:
        CheckpointError: it is no pair of numbers above zero.
    """
    if isinstance(given, list) and len(given) == 2:
        rows, columns = given
        if type(rows) is int and type(columns) is int and rows > 0 and columns > 0:
            return rows, columns
    raise CheckpointError(f"{where}: the size of blocks is {quoted(given)}, not two numbers")
