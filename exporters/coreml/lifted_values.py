"""A function's operations, constants and numbers, as `exporters.coreml.lifting` takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from exporters.coreml.constants import Constant as Stored
from exporters.coreml.constants import read_constant, read_text
from exporters.coreml.names import GAINS, TOKENS, UPDATED, is_weight, weight_name
from exporters.coreml.numbers import NUMBERS
from exporters.coreml.package import Package, tensor_type
from exporters.coreml.weights import DESCALE, HALVED_NAME, INPUT_SCALE_NAME, WIDENED_NAME
from exporters.errors import ExportError
from exporters.lifted import (
    Array,
    Constant,
    Numbers,
    Probe,
    StoredFormat,
    StoredWeight,
    Tokens,
    Unknown,
    Value,
    are_numbers,
    at,
    probes_of,
)
from exporters.lifted_recurrent import (
    Function,
    FunctionName,
)

_FLOATS: Final = {"fp16": "fp16", "fp32": "fp32"}
_STATES: Final = {
    "keyCache": "key",
    "valueCache": "value",
    "convState": "recent",
    "shiftState": "recent",
    "channelShiftState": "mlp_recent",
    "memoryHigh": "memory",
    "memoryLow": "memory",
}
# The weight of a short convolution has at most so many columns.
_FEW_COLUMNS: Final = 16
# Constants of so many bytes are weights under an unknown name, and are not read.
_LARGEST_CONSTANT: Final = 1 << 28


@dataclass(frozen=True, eq=False)
class Part(Value):
    """A weight, or a part of one.

    Attributes:
        weight: the weight, with the format in which the file holds it.
        part: ``value`` for a weight that operations read, ``descale`` for the factors of its
            rows, ``input_scale`` for the scale of what enters it.
        values: the values of a vector or of a convolution; None for a matrix.
    """

    weight: StoredWeight
    part: str
    values: Array | None = None


@dataclass(frozen=True, eq=False)
class Held(Value):
    """A cache as it is before a call.

    Attributes:
        cache: its state's or its input's name.
    """

    cache: str


@dataclass(frozen=True, eq=False)
class Updated(Value):
    """A cache with the rows of new tokens.

    Attributes:
        old: the cache before.
        new: the new rows.
        rows: where they are, for each probe.
        written: the state or the output that takes the cache; empty as long as none does.
    """

    old: Held
    new: Value
    rows: tuple[tuple[int, ...], ...]
    written: str = ""


@dataclass(frozen=True, eq=False)
class TableRows(Value):
    """Rows of a table of cosines or sines for the tokens of a call.

    Attributes:
        table: the whole table.
        rows: the rows, for each probe.
        signs: the sign of each copy of the rows that stand side by side.
    """

    table: Array
    rows: tuple[tuple[int, ...], ...]
    signs: tuple[int, ...] = (1,)


@dataclass(frozen=True, eq=False)
class Swapped(Value):
    """The second half of some columns, then the first."""

    source: Value


class Operations:
    """The operations of a function and its branches, with their operands by parameter.

    Args:
        package: the package.
        name: the function's name.
        constants: arrays that were read already, by their place; functions share them.
    """

    def __init__(self, package: Package, name: str, constants: dict[object, Array]) -> None:
        self.package, self.name, self.constants = package, name, constants
        self.block = package.block(name)
        self.operations = list(package.operations(name))
        self.outputs = set(map(str, self.block.outputs))
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for operation in self.operations:
            for output in operation.outputs:
                self.note(str(output.name), output.type)

    def note(self, name: str, kind: Any) -> None:
        """Keeps the type of a value; texts have none that is kept."""
        try:
            found = tensor_type(kind, name)
        except ExportError:
            return
        self.shapes[name], self.dtypes[name] = found.shape, found.dtype

    def constant(self, name: str, value: Any) -> Stored:
        """A constant that an operation holds.

        Raises:
            ExportError: it cannot be read.
        """
        return read_constant(self.package, value, name)

    def array(self, name: str, value: Any) -> Array:
        """A constant that is no weight, as an array."""
        if value.WhichOneof("value") != "blobFileValue":
            return np.asarray(self.constant(name, value).codes())
        place = value.blobFileValue.fileName, value.blobFileValue.offset, self.dtypes.get(name)
        if place not in self.constants:
            stored = self.constant(name, value)
            if stored.data.nbytes > _LARGEST_CONSTANT:
                raise ExportError(
                    f"{self.package.path} has a constant of {stored.data.nbytes} bytes: {name}"
                )
            self.constants[place] = np.asarray(stored.codes())
        return self.constants[place]

    def weights_with_factors(self) -> set[str]:
        """The weights whose rows were scaled, so that results are multiplied by factors."""
        names = (str(each.outputs[0].name) for each in self.operations if each.type == "const")
        return {weight_name(name.removesuffix(DESCALE)) for name in names if name.endswith(DESCALE)}

    def lifted_constant(self, operation: Any) -> Value:
        """A ``const`` as a part of a weight, an array, or a text."""
        name, value = str(operation.outputs[0].name), operation.attributes["val"]
        text = read_text(value)
        if text is not None:
            return Unknown(text, "text")
        for suffix, part in ((DESCALE, "descale"), (INPUT_SCALE_NAME, "input_scale")):
            if name.endswith(suffix):
                weight = StoredWeight(weight_name(name.removesuffix(suffix)), StoredFormat(""))
                return Part(name, weight, part)
        plain, format = name, StoredFormat(_FLOATS.get(self.dtypes[name], self.dtypes[name]))
        for suffix, kind in ((WIDENED_NAME, "bf16"), (HALVED_NAME, "fp32")):
            if name.endswith(suffix):
                plain, format = name.removesuffix(suffix), StoredFormat(kind)
        if not is_weight(plain):
            return Constant(name, self.array(name, value))
        shape = self.shapes[name]
        short = len(shape) == 1 or (shape[-1] is not None and shape[-1] <= _FEW_COLUMNS)
        short = short or weight_name(plain).endswith(GAINS)
        values = self.array(name, value).astype(np.float32) if short else None
        return Part(name, StoredWeight(weight_name(plain), format), "value", values)

    def unpacked(self, operation: Any) -> Value:
        """An operation that makes a weight of codes and scales or tables."""
        name, kind = str(operation.outputs[0].name), str(operation.type)
        parts = {
            str(key): self.constant(f"{key} of {name}", value)
            for key, value in _parameters(operation)
            if str(key) in ("data", "quantized_data", "indices", "scale", "offset", "lut")
        }
        format = _unpacked_format(kind, parts)
        if format is None or not is_weight(name):
            return Unknown(name, kind)
        return Part(name, StoredWeight(weight_name(name), format), "value")


def _parameters(operation: Any) -> list[tuple[str, Any]]:
    given = list(operation.attributes.items())
    for key, argument in operation.inputs.items():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                given.append((key, binding.value))
    return given


def _unpacked_format(kind: str, parts: Mapping[str, Stored]) -> StoredFormat | None:
    match kind:
        case "constexpr_blockwise_shift_scale":
            data, groups = parts["data"], parts["scale"].shape[-1]
            return StoredFormat("int", data.bits, groups, "offset" in parts)
        case "constexpr_affine_dequantize":
            return StoredFormat("int", parts["quantized_data"].bits, 1)
        case "constexpr_lut_to_dense":
            table = parts["lut"]
            if len(table.shape) == 1:  # iOS 16's operation packs codes into bytes
                return StoredFormat("palette", int(math.log2(table.shape[0])), 1)
            return StoredFormat("palette", parts["indices"].bits, table.shape[0])
    return None


def computed(
    kind: str, name: str, given: Mapping[str, tuple[Value, ...]], probes: tuple[Probe, ...]
) -> Numbers | None:
    """Computes an operation whose operands are all numbers; None for any other."""
    flat = tuple(value for values in given.values() for value in values)
    plain = tuple(v for v in flat if not (isinstance(v, Unknown) and v.kind == "text"))
    if not any(isinstance(value, Numbers) for value in flat) and kind != "range_1d":
        return None
    if kind == "shape" and isinstance(flat[0], Tokens):
        return None
    if not are_numbers(plain):
        return None
    if kind == "gather" and at(given["x"][0], 0).dtype.kind == "f":
        return None  # rows of a rotary table
    arrays = []
    for i in range(len(probes)):
        if kind == "concat":
            pieces = [np.atleast_1d(at(value, i)) for value in given["values"]]
            arrays.append(np.concatenate(pieces, int(at(given["axis"][0], i).ravel()[0])))
            continue
        if kind not in NUMBERS:
            return None
        operands = {
            key: at(values[0], i)
            for key, values in given.items()
            if isinstance(values[0], Constant | Numbers)
        }
        arrays.append(NUMBERS[kind](operands))
    return Numbers(name, tuple(arrays))


def probes_of_function(package: Package, name: str, context: int) -> tuple[Probe, ...]:
    """The calls of every number of tokens that a function takes."""
    interface = package.interface(name)
    counts: set[int] = set()
    for feature in interface.inputs:
        if feature.name == TOKENS:
            shapes = feature.shapes or (feature.shape,)
            counts = {shape[1] for shape in shapes if len(shape) == 2}
    for given in package.function(name).inputs:
        if given.name == TOKENS:
            fixed = tensor_type(given.type, TOKENS).shape
            if len(fixed) == 2 and fixed[1] is not None:
                counts = {fixed[1]}
    if not counts:
        raise ExportError(f"{package.path}: {name} does not say how many tokens a call takes")
    return probes_of(context, tuple(sorted(counts)))


def cache_label(name: str) -> str:
    """A state's name without the side on which it enters or leaves.

    >>> cache_label("keyCache_3"), cache_label("valueCache_0Updated"), cache_label("convState_1")
    ('3.key', '0.value', '1.recent')
    """
    kind, _, layer = name.removesuffix(UPDATED).partition("_")
    part = _STATES.get(kind)
    return f"{layer}.{part}" if layer.isdecimal() and part else name


@dataclass
class Walk:
    """The state that handlers share while a function is lifted.

    Attributes:
        operations: the function's operations.
        probes: the calls for which numbers are computed.
        values: every value so far, by name.
        states: what each state, or input that is a cache, holds now.
        factors: the weights whose rows' results are multiplied by factors.
        outside: operations that are not expected, in words.
        visible: which tokens a mask shows, by the mask's name.
        kept: by the name of rows, the state or the output that gets some of them, how many those
            are (None where it depends on the number of tokens), and how many are behind them.
        cast_from: by the name of what a cast or a view gives, the name of what it was given.
        highs: by the identity of a value, the state or the output that gets it.
    """

    operations: Operations
    probes: tuple[Probe, ...]
    values: dict[str, Value] = field(default_factory=dict)
    states: dict[str, Value] = field(default_factory=dict)
    factors: set[str] = field(default_factory=set)
    outside: list[str] = field(default_factory=list)
    visible: dict[str, tuple[Array, ...] | None] = field(default_factory=dict)
    kept: dict[str, tuple[str, int | None, int]] = field(default_factory=dict)
    cast_from: dict[str, str] = field(default_factory=dict)
    highs: dict[int, str] = field(default_factory=dict)

    def shape(self, value: Value) -> tuple[int | None, ...]:
        """The shape of a value as the function states it."""
        return self.operations.shapes.get(value.name, ())


def whole_numbers(value: Value) -> tuple[int, ...] | None:
    """A constant list of numbers; None for anything else."""
    return tuple(map(int, value.array.ravel())) if isinstance(value, Constant) else None


def number(value: Value) -> float | None:
    """A constant number; None for anything else."""
    if not isinstance(value, Constant) or value.array.size != 1:
        return None
    return float(value.array.ravel()[0])


def function_operand(value: Value, function: FunctionName) -> Value | None:
    """What a function of each element is taken of; None for anything else."""
    own = isinstance(value, Function) and value.function == function
    return value.source if own else None  # type: ignore[attr-defined]


def operands(value: Value, kind: str) -> tuple[Value, ...] | None:
    """The operands, in the order of their parameters' names, of an operation of this kind."""
    return value.operands if isinstance(value, Unknown) and value.kind == kind else None
