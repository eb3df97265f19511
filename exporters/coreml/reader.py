"""Reads integers and scales back from a package, to compare them with the store's.

The result of the operation that makes a weight has the weight's name. The operation's parameters
tell which constant is which part of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.blobs import flip_nibble_signs, flip_sign, narrow_to_bfloat16
from exporters.coreml.constants import Constant, read_constant
from exporters.coreml.names import is_weight, weight_name
from exporters.coreml.package import Package, open_package
from exporters.coreml.scales import Exponents, are_half, from_half
from exporters.coreml.weights import DESCALE, HALVED_NAME, INPUT_SCALE_NAME, WIDENED_NAME
from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.stored_digests import digests_of
from quant.formats.activations import INPUT_SCALE

_BLOCK: Final = 1 << 20
# The part of a weight that each parameter of the operations that make weights holds.
_PARTS: Final = {
    "data": "codes",
    "quantized_data": "codes",
    "indices": "codes",
    "scale": "scale",
    "offset": "zero_point",
    "lut": "lut",
}
_UNSIGNED: Final[dict[str, Callable[[bytes], bytes]]] = {
    "int4": flip_nibble_signs,
    "int8": flip_sign,
}


def _widen(half: bytes) -> bytes:
    """float32 from float16, without loss."""
    return np.frombuffer(half, np.float16).astype(np.float32).tobytes()


# How a float weight's bytes become the store's, by the end of its name.
_STORED_FLOATS: Final[dict[str, Callable[[bytes], bytes] | None]] = {
    WIDENED_NAME: narrow_to_bfloat16,
    HALVED_NAME: _widen,
    "": None,
}


@dataclass(frozen=True)
class StoredPart:
    """A part of a weight, and how its bytes become the store's.

    Attributes:
        constant: the constant, as the package holds it.
        place: identifies where the constant is; parts with equal places have the same bytes.
        restore: undoes the file's layout, one block at a time; None when the store's is the same.
        exponents: the power of two by which each row was multiplied, for scales that are bfloat16
            in the store; None for all other parts.
    """

    constant: Constant
    place: object
    restore: Callable[[bytes], bytes] | None = None
    exponents: Exponents | None = None

    @property
    def nbytes(self) -> int:
        """The size as the package holds it, in bytes."""
        return self.constant.data.nbytes

    def blocks(self) -> Iterator[bytes]:
        """Yields the bytes as the store holds them, one block at a time."""
        if self.exponents is not None:
            columns = self.constant.data.view(np.uint16).reshape(len(self.exponents), -1).shape[1]
            step = max(1, _BLOCK // (2 * columns))
            for number, block in enumerate(self.constant.blocks(step * 2 * columns)):
                rows = np.frombuffer(block, np.uint16).reshape(-1, columns)
                start = number * step
                yield from_half(rows, self.exponents[start : start + len(rows)]).tobytes()
            return
        for block in self.constant.blocks(_BLOCK):
            yield self.restore(block) if self.restore else block


Parts = dict[str, list[StoredPart]]
"""The places of each part of a weight; there are several when functions do not share it."""


def read_parts(package: Package) -> dict[str, Parts]:
    """Finds the parts of every weight among all functions' operations, by weight name.

    Raises:
        ExportError: a constant cannot be read.
    """
    with one_sentence(package.path, "a Core ML package"):
        return _read_parts(package)


def _read_parts(package: Package) -> dict[str, Parts]:
    weights: dict[str, Parts] = {}
    places: set[tuple[str, str, object]] = set()
    for function in package.functions:
        operations = {
            str(operation.outputs[0].name): operation
            for operation in package.operations(function)
            if operation.type.startswith("const") and operation.outputs
        }
        for name, operation in operations.items():
            for weight, part, stored in _parts_of(package, name, operation, operations):
                if (weight, part, stored.place) not in places:
                    places.add((weight, part, stored.place))
                    weights.setdefault(weight, {}).setdefault(part, []).append(stored)
    return weights


def _parts_of(
    package: Package, name: str, operation: Any, operations: dict[str, Any]
) -> Iterator[tuple[str, str, StoredPart]]:
    """Yields the weight's name, the part and its bytes for each part that an operation holds."""
    if operation.type == "const":
        if name.endswith(INPUT_SCALE_NAME):
            constant, place = _constant(package, name, operation.attributes["val"])
            stored = StoredPart(constant, place, exponents=np.zeros((1, 1), np.int32))
            yield weight_name(name.removesuffix(INPUT_SCALE_NAME)), INPUT_SCALE, stored
            return
        for suffix, restore in _STORED_FLOATS.items():
            plain = name.removesuffix(suffix)
            if name.endswith(suffix) and is_weight(plain):
                constant, place = _constant(package, name, operation.attributes["val"])
                yield weight_name(plain), "value", StoredPart(constant, place, restore)
                return
        return
    if not is_weight(name):
        return
    for parameter, value in _parameters(operation):
        if parameter not in _PARTS:
            continue
        constant, place = _constant(package, f"{parameter} of {name}", value)
        part = _PARTS[parameter]
        if part == "scale":
            exponents, known_by = _exponents(package, operations.get(name + DESCALE), constant)
            widened = known_by is not None or not _are_half(constant)
            stored = StoredPart(
                constant, (place, known_by), exponents=exponents if widened else None
            )
        elif part == "zero_point":
            stored = StoredPart(_padded_rows(constant), place)
        elif constant.dtype == "fp16":  # a table of values
            stored = StoredPart(constant, place)
        else:
            stored = StoredPart(constant, place, _UNSIGNED.get(constant.dtype))
        yield weight_name(name), part, stored


def _parameters(operation: Any) -> Iterator[tuple[str, Any]]:
    """The constants that an operation itself holds: attributes before iOS 18, arguments since."""
    yield from operation.attributes.items()
    for parameter, argument in operation.inputs.items():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield parameter, binding.value


def _constant(package: Package, where: str, value: Any) -> tuple[Constant, object]:
    constant = read_constant(package, value, where)
    if value.WhichOneof("value") == "blobFileValue":
        return constant, (value.blobFileValue.fileName, value.blobFileValue.offset)
    return constant, constant.data.tobytes()


def _exponents(package: Package, inverse: Any, scale: Constant) -> tuple[Exponents, object]:
    """The power of two by which each row of scales was multiplied, and where that is stored.

    Args:
        package: the package.
        inverse: the operation that holds the inverse of each row's factor; None when no row was
            multiplied.
        scale: the scales.

    Raises:
        ExportError: the inverses are not one power of two for each row.
    """
    rows = scale.shape[0]
    if inverse is None:
        return np.zeros((rows, 1), np.int32), None
    constant, place = _constant(package, "the factors of a weight", inverse.attributes["val"])
    factors = np.asarray(constant.data, np.float32)
    mantissas, exponents = np.frexp(factors)
    if factors.shape != (rows,) or (mantissas != 0.5).any():
        raise ExportError(
            f"{package.path} has factors of a weight that are not one power of two for each of "
            f"its {rows} rows: the package was changed"
        )
    return (1 - exponents)[:, None].astype(np.int32), place


def _are_half(scale: Constant) -> bool:
    """Whether scales are float16 in the store too; see `exporters.coreml.scales.are_half`."""
    return any(are_half(np.frombuffer(block, np.uint16)) for block in scale.blocks(_BLOCK))


def _padded_rows(constant: Constant) -> Constant:
    """Zero points as the store holds them: each row of nibbles ends on a whole byte."""
    if constant.bits == 8 or constant.shape[1] % 2 == 0:
        return constant
    codes = np.pad(constant.codes(), ((0, 0), (0, 1)))
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    return Constant("uint8", packed.shape, packed)


def stored_digests(package: Path) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight from the written files alone.

    When functions hold a weight in several places and these differ, its text lists every digest
    found, so that it equals no digest of the store.

    Raises:
        ExportError: a file is missing, too short or damaged, or the folder is no Core ML package.
    """
    opened = open_package(package)
    return digests_of(read_parts(opened), package, opened.nbytes)
