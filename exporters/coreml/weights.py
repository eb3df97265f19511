"""Weights as Core ML constants: integers with their scales, and floats.

The store's codes are unsigned. Those of a symmetric format become Core ML's signed integers, whose
bytes are the store's with the highest bit of each code flipped. `exporters.coreml.scales` explains
the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from exporters.blobs import SIGNED, SIGNED_NIBBLES, WIDENED, Blob, Conversion
from exporters.coreml.emitter import Emitter
from exporters.coreml.function import FileValue, Shape, Value, array_value
from exporters.coreml.names import identifier
from exporters.coreml.scales import Exponents, ScaleBlob, row_exponents, to_half
from exporters.coreml.weight_file import WeightFile
from quant.formats.activations import INPUT_SCALE
from quant.formats.formats import IntFormat, PaletteFormat
from quant.store.store import WeightStore

# Suffix of the constant by which the results of a weight's rows are multiplied.
DESCALE: Final = "__descale"
# Suffix of the constant that holds the scale of the activations that enter a weight.
INPUT_SCALE_NAME: Final = "__input_scale"
# Suffix of a weight that is bfloat16 in the store and float32 in the file.
WIDENED_NAME: Final = "__widened"
# Suffix of a bias that is float32 in the store and, without loss, float16 in the file.
HALVED_NAME: Final = "__halved"


@dataclass(frozen=True)
class Weight:
    """A weight in a function.

    Attributes:
        value: the value that operations read.
        descale: ``fp16[rows]``, the factors of the rows' results; None when all are 1.
    """

    value: Value
    descale: Value | None = None


class WeightBank:
    """Places a store's weights in the weight file and emits them in functions.

    Several functions share the places of their weights.

    Args:
        store: the store of the weights.
        file: the weight file.
    """

    def __init__(self, store: WeightStore, file: WeightFile) -> None:
        self.store, self.file = store, file
        self._exponents: dict[str, Exponents] = {}

    def integer(self, emitter: Emitter, weight: str, format: IntFormat, shape: Shape) -> Weight:
        """Emits a matrix that is stored in integers and read as float16.

        Args:
            emitter: the function to add to.
            weight: the weight's name.
            format: the weight's format.
            shape: the number of rows and of columns.
        """
        extents, name = self.store.extents(weight), identifier(weight)
        exponents = self._exponents_of(weight)
        signed = SIGNED_NIBBLES if format.bits == 4 else SIGNED
        data = self._file_value(
            weight,
            "codes",
            f"{'' if format.symmetric else 'u'}int{format.bits}",
            shape,
            signed if format.symmetric else None,
        )
        groups = extents["scale"].shape
        half = format.scale_dtype == "float16"
        blob = Blob(extents["scale"]) if half else ScaleBlob(extents["scale"], exponents)
        offset = self.file.place((weight, "scale"), "fp16", int(np.prod(groups)), blob)
        scale = FileValue("fp16", groups, offset)
        if emitter.opset == "CoreML7":
            value = self._affine(emitter, name, data, scale)
        else:
            parts = {"data": data, "scale": scale}
            if not format.symmetric:
                parts["offset"] = self._zero_point(weight, format, groups)
            value = emitter.constexpr("constexpr_blockwise_shift_scale", name, "fp16", shape, parts)
        if not exponents.any():
            return Weight(value)
        inverse = self.table(emitter, name + DESCALE, np.exp2(-exponents[:, 0].astype(np.float32)))
        return Weight(value, emitter.cast_once(f"{inverse.name}_half", inverse, "fp16"))

    def _exponents_of(self, weight: str) -> Exponents:
        """The exponent of each row of scales; 0 where the store's scales are float16."""
        extent = self.store.extents(weight)["scale"]
        if weight not in self._exponents:
            self._exponents[weight] = (
                row_exponents(weight, extent)
                if extent.dtype == "BF16"
                else np.zeros((extent.shape[0], 1), np.int32)
            )
        return self._exponents[weight]

    def palette(self, emitter: Emitter, weight: str, format: PaletteFormat, shape: Shape) -> Value:
        """Emits a matrix of codes that index tables of float16 values; arguments as `integer`."""
        name, bits, entries = identifier(weight), format.bits, format.entries
        extents = self.store.extents(weight)
        tables = self._file_value(weight, "lut", "fp16", extents["lut"].shape, None)
        kind = "constexpr_lut_to_dense"
        if emitter.opset == "CoreML7":  # iOS 16's operation: one table, packed bytes, a shape
            packed = (weight, "bytes"), "uint8", extents["codes"].nbytes, Blob(extents["codes"])
            parts: dict[str, object] = {
                "indices": FileValue("uint8", (extents["codes"].nbytes,), self.file.place(*packed)),
                "lut": FileValue("fp16", (entries,), tables.offset),
                "shape": array_value("uint32", np.asarray(shape)),
            }
        else:
            groups = tables.shape[0]
            parts = {
                "indices": self._file_value(weight, "codes", f"uint{bits}", shape, None),
                "lut": FileValue("fp16", (groups, 1, entries, 1), tables.offset),
            }
        return emitter.constexpr(kind, name, "fp16", shape, parts)

    def _affine(self, emitter: Emitter, name: str, data: FileValue, scale: FileValue) -> Value:
        """Emits iOS 16's operation for integers of 8 bits with one scale a row."""
        parts = {
            "quantized_data": data,
            "scale": FileValue("fp16", scale.shape[:1], scale.offset),
            "zero_point": array_value("int8", np.asarray(0)),
            "axis": array_value("int32", np.asarray(0)),
        }
        return emitter.constexpr("constexpr_affine_dequantize", name, "fp16", data.shape, parts)

    def _zero_point(self, weight: str, format: IntFormat, groups: Shape) -> FileValue:
        """Places the zero points, one a group, without the store's padding at each row's end."""
        dtype = f"uint{format.bits}"
        if format.bits == 8 or groups[1] % 2 == 0:
            return self._file_value(weight, "zero_point", dtype, groups, None)
        packed = self.store.part(weight, "zero_point").numpy()
        codes = np.stack((packed & 15, packed >> 4), -1).reshape(groups[0], -1)[:, : groups[1]]
        flat = np.append(codes.ravel(), np.zeros(codes.size % 2, np.uint8))
        blob = Blob((flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes())
        offset = self.file.place((weight, "zero_point"), dtype, codes.size, blob)
        return FileValue(dtype, groups, offset)

    def floating(self, emitter: Emitter, weight: str, shape: Shape) -> Value:
        """Emits a weight that stays float: float16 as it is, other dtypes exactly as float32."""
        extent = self.store.extents(weight)["value"]
        dtype = "fp16" if extent.dtype == "F16" else "fp32"
        conversion = WIDENED if extent.dtype == "BF16" else None
        value = self._file_value(weight, "value", dtype, shape, conversion)
        return emitter.stored(identifier(weight) + (WIDENED_NAME if conversion else ""), value)

    def bias(self, emitter: Emitter, weight: str, dtype: str) -> Value | None:
        """Emits a bias in the dtype of its product; None where that would round it.

        Args:
            emitter: the function to add to.
            weight: the bias's name.
            dtype: the dtype of the product that adds it.
        """
        extent = self.store.extents(weight)["value"]
        shape = (int(np.prod(extent.shape)),)
        if (extent.dtype, dtype) in (("F32", "fp32"), ("F16", "fp16")):
            return self.floating(emitter, weight, shape)
        if extent.dtype != "F32" or dtype != "fp16":
            return None
        values = self.store.part(weight, "value").numpy()
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32).view(np.uint32), values.view(np.uint32)):
            return None
        offset = self.file.place((weight, "halved"), "fp16", half.size, Blob(half.tobytes()))
        name = identifier(weight) + HALVED_NAME
        return emitter.stored(name, FileValue("fp16", shape, offset))

    def input_scale(self, emitter: Emitter, weight: str) -> Value:
        """Emits the scale of the activations that enter a matrix, as float16, which is exact."""
        import torch  # here, as reading a package back needs none

        bits = self.store.part(weight, INPUT_SCALE).view(torch.uint16).numpy()
        half = to_half(bits, np.zeros((1, 1), np.int32)).view(np.float16).reshape(())
        return emitter.inline(identifier(weight) + INPUT_SCALE_NAME, "fp16", half)

    def table(self, emitter: Emitter, name: str, values: npt.NDArray[np.generic]) -> Value:
        """Emits a constant of float16 or float32 that is not a weight, for a whole function."""
        dtype = {2: "fp16", 4: "fp32"}[values.itemsize]
        offset = self.file.place((name, dtype), dtype, values.size, Blob(values.tobytes()))
        return emitter.stored(name, FileValue(dtype, values.shape, offset), shared=True)

    def _file_value(
        self, weight: str, part: str, dtype: str, shape: Shape, conversion: Conversion | None
    ) -> FileValue:
        extent = self.store.extents(weight)[part]
        count = int(np.prod(shape))
        offset = self.file.place((weight, part), dtype, count, Blob(extent, conversion))
        return FileValue(dtype, shape, offset)
