"""What a package's functions consist of: operations by type, and weights by stored format."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

from exporters.coreml.package import Package, TensorType, tensor_type
from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.structure import Section

# Parameters of the operations that make weights which hold the codes or values to unpack.
_UNPACKED: Final = ("data", "indices", "quantized_data", "nonzero_data")


def structure_of(package: Package) -> tuple[Section, ...]:
    """Tables of every function's operations and weights, read from the files.

    A weight that several functions share is listed under each of them.

    Raises:
        ExportError: the package is damaged.
    """
    with one_sentence(package.path, "a Core ML package"):
        return _sections(package)


def _sections(package: Package) -> tuple[Section, ...]:
    operations = {
        (name, str(operation.type)): 0
        for name in package.functions
        for operation in package.operations(name)
    }
    for name in package.functions:
        for operation in package.operations(name):
            operations[name, str(operation.type)] += 1
    weights = {
        (name, kind): found
        for name in package.functions
        for kind, found in weight_formats(package, name).items()
    }
    return (
        Section(
            "Operations",
            ("function", "operation", "times"),
            tuple((*key, count) for key, count in sorted(operations.items())),
        ),
        Section(
            "Stored weights",
            ("function", "format", "tensors", "bytes"),
            tuple((*key, *found) for key, found in sorted(weights.items())),
        ),
    )


def weight_formats(package: Package, function: str) -> dict[str, tuple[int, int]]:
    """The number of tensors and their bytes, by stored format.

    A format is the dtype of a constant in the weight file, or the dtype of the codes and the
    operation that unpacks them. Bytes include codes, scales, offsets and tables.
    """
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for operation in package.operations(function):
        kind = str(operation.type)
        if kind == "const" and "val" in operation.attributes:
            value = operation.attributes["val"]
            if value.WhichOneof("value") == "blobFileValue":
                given = _type(value.type)
                tensors[_dtype(given)] += 1
                sizes[_dtype(given)] += _nbytes(given)
        elif kind.startswith("constexpr_"):
            parts = {name: _type(value.type) for name, value in _values(operation)}
            unpacked = [_dtype(parts[name]) for name in _UNPACKED if name in parts]
            label = " ".join([*unpacked, f"by {kind}"])
            tensors[label] += 1
            sizes[label] += sum(map(_nbytes, parts.values()))
    return {label: (count, sizes[label]) for label, count in tensors.most_common()}


def _values(operation: Any) -> list[tuple[str, Any]]:
    """The constants that an operation holds: arguments, or attributes in iOS 16's operations."""
    given = [
        (str(name), binding.value)
        for name, argument in operation.inputs.items()
        for binding in argument.arguments
        if binding.WhichOneof("binding") == "value"
    ]
    return given + [(str(name), value) for name, value in operation.attributes.items()]


def _type(value_type: Any) -> TensorType | None:
    try:
        return tensor_type(value_type, "a weight")
    except ExportError:
        return None


def _dtype(given: TensorType | None) -> str:
    return given.dtype if given is not None else "unknown"


def _nbytes(given: TensorType | None) -> int:
    """The bytes of a tensor's elements as the weight file packs them."""
    if given is None or given.dtype == "string":
        return 0
    digits = re.search(r"[0-9]+", given.dtype)
    bits = int(digits[0]) if digits else 8
    return -(-given.elements * bits // 8)
