"""Checkpoints of bitsandbytes in 4 bits: NF4 (Dettmers et al. 2023) and FP4, read as floats.

``weight: uint8[n / 2, 1]`` holds two codes a byte, the first in the high half, of the matrix row by
row; a code is an index into ``weight.quant_map: float32[16]``. Each block of codes has a factor,
``weight.absmax``: ``float32``, or, where factors were quantized too, ``uint8`` indices into
``weight.nested_quant_map: float32[256]``, times ``weight.nested_absmax`` of a block of factors,
plus an offset. The tensor ``weight.quant_state.bitsandbytes__nf4`` is JSON text with the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.integer_tensor import IntegerTensor
from edgeforge.checkpoint.json_text import parse_object
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

if TYPE_CHECKING:
    import torch

    from edgeforge.checkpoint.checkpoint import Checkpoint
    from edgeforge.checkpoint.imported.decoded_tensor import DecodedTensor

_TYPES: Final = ("nf4", "fp4")
_STATE: Final = "weight.quant_state.bitsandbytes__"
_MAX_STATE: Final = 1 << 16
_HARMLESS: Final = (
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_target_parameters",
    "bnb_4bit_use_double_quant",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_skip_modules",
    "llm_int8_threshold",
    "load_in_4bit",
    "quant_method",
)


@dataclass(frozen=True)
class FourBitLayers:
    """The matrices of a checkpoint of bitsandbytes in 4 bits."""

    method: ClassVar[str] = "bitsandbytes"
    sign: ClassVar[str] = "*.weight.quant_map"

    def find(
        self, checkpoint: Checkpoint, tensor: str, shape: tuple[int, ...]
    ) -> IntegerTensor | DecodedTensor | None:
        """As `edgeforge.checkpoint.imported.method.Method.find`."""
        module = tensor.removesuffix(".weight")
        if len(shape) == 1 or f"{tensor}.quant_map" not in checkpoint.tensors:
            return None
        state = next((t for t in _TYPES if f"{module}.{_STATE}{t}" in checkpoint.tensors), None)
        if state is None:
            raise CheckpointError(
                f"the checkpoint lacks {module}.{_STATE}nf4, which says how {tensor} is quantized"
            )
        return _FourBits(checkpoint, tensor, state, (shape[0], shape[1]))

    def notes(self) -> tuple[str, ...]:
        """As `edgeforge.checkpoint.imported.method.Method.notes`."""
        return ()


class _FourBits:
    """A matrix of codes of 4 bits."""

    dtype: ClassVar[str] = "float32"

    def __init__(
        self, checkpoint: Checkpoint, name: str, kind: str, shape: tuple[int, int]
    ) -> None:
        self._checkpoint, self._name, self._kind, self._shape = checkpoint, name, kind, shape
        state_name = f"{name.removesuffix('.weight')}.{_STATE}{kind}"
        entry = checkpoint.tensors[state_name]
        if entry.dtype != "uint8" or entry.nbytes > _MAX_STATE:
            raise CheckpointError(
                f"{state_name} is {entry.dtype} {list(entry.shape)}, no JSON text"
            )
        text = checkpoint.read_bytes(state_name, 0, entry.nbytes).tobytes()
        state = parse_object(text, state_name, strict=False)
        self._block = self._size(state, "blocksize", state_name)
        self._nested = "nested_absmax" in state or f"{name}.nested_absmax" in checkpoint.tensors
        if state.get("quant_type") != kind or state.get("shape") != list(shape):
            raise CheckpointError(
                f"{state_name} says {quoted(state.get('quant_type'))} and a shape of "
                f"{quoted(state.get('shape'))}; its name says {kind}, and config.json calls for "
                f"{list(shape)}"
            )
        values = shape[0] * shape[1]
        blocks = -(-values // self._block)
        self._require("", "uint8", -(-values // 2))
        self._require(".quant_map", "float32", 16)
        self._require(".absmax", "uint8" if self._nested else "float32", blocks)
        self._nested_block, self._offset = 1, 0.0
        if self._nested:
            self._nested_block = self._size(state, "nested_blocksize", state_name)
            offset = state.get("nested_offset", 0.0)
            if isinstance(offset, bool) or not isinstance(offset, int | float):
                raise CheckpointError(f"{state_name}: nested_offset is {quoted(offset)}")
            self._offset = float(offset)
            self._require(".nested_quant_map", "float32", 256)
            self._require(".nested_absmax", "float32", -(-blocks // self._nested_block))
        self._state = state_name

    @property
    def tensors(self) -> tuple[str, ...]:
        """As `DecodedTensor.tensors`."""
        parts = ["", ".quant_map", ".absmax"]
        parts += [".nested_quant_map", ".nested_absmax"] if self._nested else []
        return (self._state, *(f"{self._name}{part}" for part in parts))

    @property
    def form(self) -> str | None:
        """As `DecodedTensor.form`."""
        nested = ", factors of 8 bits" if self._nested else ""
        return f"{self._kind.upper()} in blocks of {self._block}{nested}"

    def read(self, start: int, stop: int) -> torch.Tensor:
        """As `DecodedTensor.read`."""
        import torch

        columns = self._shape[1]
        first, last = start * columns, stop * columns
        read = self._checkpoint.read_bytes(self._name, first // 2, -(-last // 2))
        packed = torch.from_numpy(read)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
        codes = codes[first % 2 : first % 2 + last - first]
        values = self._vector(".quant_map")[codes.long()]
        low, high = first // self._block, -(-last // self._block)
        factors = self._factors(low, high)
        values *= factors[torch.arange(first, last) // self._block - low]
        if not bool(values.isfinite().all()):
            raise CheckpointError(
                f"{self._name} holds values that are no finite numbers: the checkpoint is damaged"
            )
        return values.reshape(-1, columns)

    def _factors(self, low: int, high: int) -> torch.Tensor:
        """Returns the factors of some blocks, ``float32[high - low]``."""
        import torch

        if not self._nested:
            return self._vector(".absmax")[low:high]
        read = self._checkpoint.read_bytes(f"{self._name}.absmax", low, high)
        found = self._vector(".nested_quant_map")[torch.from_numpy(read).long()]
        outer = self._vector(".nested_absmax")[torch.arange(low, high) // self._nested_block]
        return found * outer + self._offset

    def _vector(self, part: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._checkpoint.read(f"{self._name}{part}")).float().flatten()

    def _require(self, part: str, dtype: str, count: int) -> None:
        name = f"{self._name}{part}"
        entry = self._checkpoint.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"the checkpoint lacks {name}, which bitsandbytes stores")
        size = entry.nbytes // (1 if dtype == "uint8" else 4)
        if entry.dtype != dtype or size != count:
            raise CheckpointError(
                f"{name} is {entry.dtype} {list(entry.shape)}; {count} values of {dtype} belong "
                f"there"
            )

    def _size(self, state: dict[str, object], field: str, where: str) -> int:
        value = state.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 1 << 20:
            raise CheckpointError(f"{where}: {field} is {quoted(value)}, not a number of values")
        return value


def read_bitsandbytes(reader: ConfigReader) -> FourBitLayers:
    """Reads a ``quantization_config`` of bitsandbytes.

    Raises:
        CheckpointError: the checkpoint has another width than 4 bits, or another storage.
    """
    if reader.get("load_in_8bit"):
        raise CheckpointError(
            f"{reader.where} sets load_in_8bit: of bitsandbytes EdgeForge reads 4 bits (NF4 and "
            f"FP4): give the original checkpoint, in bfloat16, float16 or float32"
        )
    for field in _HARMLESS:
        reader.get(field)
    reader.choice("bnb_4bit_quant_storage", ("uint8",), "uint8")
    reader.finish()
    return FourBitLayers()
