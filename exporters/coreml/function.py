"""One function of a MIL program under construction: typed values, operations, constants.

Every operation states the types of its results. No tool of Core ML's infers them here; the tests
use such tools to check the stated types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from exporters.coreml.names import WEIGHTS_REFERENCE
from exporters.coreml.schema import DATA_TYPES, messages

Shape = tuple[int, ...]
"""The sizes of a tensor; -1 for a size that depends on the number of tokens."""

_NUMPY: Final = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}
_IN_BYTES: Final = {"fp16": np.float16, "int8": np.int8, "uint32": np.uint32}
_IMMEDIATE_LIMIT: Final = 10  # constants of so many elements or more belong in the weight file


@dataclass(frozen=True)
class Value:
    """A tensor of a function.

    Attributes:
        name: the value's name, unique within the function.
        dtype: the element type, a key of `exporters.coreml.schema.DATA_TYPES`.
        shape: the tensor's shape; empty for a scalar.
    """

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class FileValue:
    """A tensor in the weight file, named by the offset of its blob's record."""

    dtype: str
    shape: Shape
    offset: int


Literal = bool | int | float | str | Sequence[int] | Sequence[bool]
Operand = Value | Literal | Sequence[Value]


def value_type(dtype: str, shape: Shape) -> Any:
    """A tensor's type, as a ``ValueType`` message."""
    made = messages()["ValueType"]()
    tensor = made.tensorType
    tensor.dataType, tensor.rank = DATA_TYPES[dtype], len(shape)
    for size in shape:
        dimension = tensor.dimensions.add()
        if size < 0:
            dimension.unknown.variadic = False
            dimension.unknown.SetInParent()
        else:
            dimension.constant.size = size
    return made


def array_value(dtype: str, array: npt.NDArray[np.generic]) -> Any:
    """A tensor whose elements the program itself holds, as a ``Value`` message."""
    made = messages()["Value"]()
    made.type.CopyFrom(value_type(dtype, array.shape))
    tensor = made.immediateValue.tensor
    if dtype in _IN_BYTES:
        tensor.bytes.values = array.astype(_IN_BYTES[dtype]).tobytes()
    else:
        field = {"fp32": "floats", "int32": "ints", "bool": "bools"}[dtype]
        getattr(tensor, field).values.extend(array.ravel().tolist())
    return made


def text_value(text: str) -> Any:
    """A string, as a ``Value`` message."""
    made = messages()["Value"]()
    made.type.CopyFrom(value_type("string", ()))
    made.immediateValue.tensor.strings.values.append(text)
    return made


def file_value(value: FileValue) -> Any:
    """A reference into the weight file, as a ``Value`` message."""
    made = messages()["Value"]()
    made.type.CopyFrom(value_type(value.dtype, value.shape))
    made.blobFileValue.fileName = WEIGHTS_REFERENCE
    made.blobFileValue.offset = value.offset
    return made


@dataclass(frozen=True)
class _Scope:
    """A block under construction, and the values that are made once for all uses within it."""

    block: Any
    made: dict[object, Value] = field(default_factory=dict)


class FunctionBuilder:
    """Collects a function's inputs and operations.

    What is emitted while `cond` calls its arguments belongs to a branch: weights and results there
    are seen by no other branch. Small constants belong to the function, whoever needs them first.

    Args:
        name: the function's name.
        opset: MIL's name of the opset, such as ``CoreML8``.
    """

    def __init__(self, name: str, opset: str) -> None:
        self.name, self.opset = name, opset
        self.inputs: list[Value] = []
        self.states: list[Value] = []
        self.outputs: list[Value] = []
        self._message = messages()["Function"]()
        self._message.opset = opset
        self._scopes = [_Scope(self._message.block_specializations[opset])]
        self._names: set[str] = set()
        self._counts: dict[str, int] = {}

    def input(self, name: str, dtype: str, shape: Shape) -> Value:
        """Declares an input, which every call must give."""
        value = self._named(name, dtype, shape)
        self._message.inputs.add(name=name, type=value_type(dtype, shape))
        self.inputs.append(value)
        return value

    def state(self, name: str, shape: Shape) -> Value:
        """Declares a state: a float16 tensor that keeps its content from call to call."""
        value = self._named(name, "fp16", shape)
        given = self._message.inputs.add(name=name)
        given.type.stateType.wrappedType.CopyFrom(value_type("fp16", shape))
        self.states.append(value)
        return value

    def output(self, value: Value) -> None:
        """Makes a value an output."""
        self._scopes[0].block.outputs.append(value.name)
        self.outputs.append(value)

    def call(self, kind: str, name: str, dtype: str, shape: Shape, /, **operands: Operand) -> Value:
        """Emits an operation of one result and returns the result.

        Args:
            kind: the operation's name in MIL.
            name: the result's name; a number is added when the name is taken.
            dtype: the result's dtype.
            shape: the result's shape.
            operands: the operands, by the names of the operation's parameters.
        """
        return self.call_many(kind, [(name, dtype, shape)], **operands)[0]

    def call_many(
        self, kind: str, results: Sequence[tuple[str, str, Shape]], /, **operands: Operand
    ) -> list[Value]:
        """Emits an operation of any number of results and returns them; see `call`."""
        names = {key: self._operand_names(operand) for key, operand in operands.items()}
        values = [self._named(self.fresh(name), dtype, shape) for name, dtype, shape in results]
        own = values[0].name if values else self.fresh(kind)
        self._names.add(own)
        operation = self._operation(kind, own, values)
        for key, given in names.items():
            operation.inputs[key].arguments.extend(
                messages()["Binding"](name=operand) for operand in given
            )
        return values

    def cond(
        self, name: str, pred: Value, then: Callable[[], Value], otherwise: Callable[[], Value]
    ) -> Value:
        """Emits a choice between two blocks, of which a call runs only one.

        Args:
            name: the result's name.
            pred: ``bool[]``; whether the first block runs.
            then: emits the first block and returns its result.
            otherwise: emits the second block; its result has the same dtype and shape.
        """
        blocks, results = zip(*map(self._branch, (then, otherwise)), strict=True)
        first, second = results
        assert (first.dtype, first.shape) == (second.dtype, second.shape), name
        made = self.call("cond", name, first.dtype, first.shape, pred=pred)
        self._scopes[-1].block.operations[-1].blocks.extend(blocks)
        return made

    def _branch(self, emit: Callable[[], Value]) -> tuple[Any, Value]:
        self._scopes.append(_Scope(messages()["Block"]()))
        result = emit()
        block = self._scopes.pop().block
        block.outputs.append(result.name)
        return block, result

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """Emits a value once for all uses in a block and in its branches."""
        for scope in reversed(self._scopes):
            if key in scope.made:
                return scope.made[key]
        made = self._scopes[-1].made[key] = make()
        return made

    def constexpr(
        self, kind: str, name: str, dtype: str, shape: Shape, parts: Mapping[str, FileValue | Any]
    ) -> Value:
        """Emits an operation that makes a weight out of stored parts, once for each name and block.

        The parts are arguments in iOS 18's operations and attributes in iOS 16's.

        Args:
            kind: the operation's name in MIL.
            name: the weight's name.
            dtype: the weight's dtype.
            shape: the weight's shape.
            parts: the parts by parameter, each a place in the weight file or a message.
        """

        def make() -> Value:
            value = self._named(name, dtype, shape)
            operation = self._operation(kind, name, [value])
            for key, part in parts.items():
                made = file_value(part) if isinstance(part, FileValue) else part
                if self.opset == "CoreML7":
                    operation.attributes[key].CopyFrom(made)
                else:
                    operation.inputs[key].arguments.add().value.CopyFrom(made)
            return value

        return self.once(("weight", name), make)

    def stored(self, name: str, value: FileValue, *, shared: bool = False) -> Value:
        """Emits a constant in the weight file, once for each name and block.

        Args:
            name: the constant's name.
            value: its place.
            shared: whether it belongs to the function, so that all branches may read it.
        """
        once = self._of_function if shared else self.once
        message = file_value(value)
        return once(("stored", name), lambda: self._const(name, value.dtype, value.shape, message))

    def inline(self, name: str, dtype: str, value: npt.NDArray[np.generic]) -> Value:
        """Emits a short constant that the program itself holds, once for each name and block."""
        message = array_value(dtype, value)
        return self.once(("stored", name), lambda: self._const(name, dtype, value.shape, message))

    def _of_function(self, key: object, make: Callable[[], Value]) -> Value:
        """As `once`, in the function's own block, before the branch that is under construction."""
        scopes, self._scopes = self._scopes, self._scopes[:1]
        made = self.once(key, make)
        self._scopes = scopes
        return made

    def _const(self, name: str, dtype: str, shape: Shape, message: Any) -> Value:
        value = self._named(name, dtype, shape)
        self._operation("const", name, [value]).attributes["val"].CopyFrom(message)
        return value

    def constant(self, literal: Literal, dtype: str | None = None) -> Value:
        """Emits a small constant, once for equal values of one dtype.

        Args:
            literal: the value.
            dtype: the constant's dtype; by default bool, int32 or fp16, by the value's type.
        """
        if isinstance(literal, str):
            text = f"text_{literal}"
            return self._of_function(
                literal, lambda: self._const(self.fresh(text), "string", (), text_value(literal))
            )
        array = np.asarray(literal)
        kind = dtype or {"b": "bool", "i": "int32", "f": "fp16"}[array.dtype.kind]
        array = array.astype(_NUMPY[kind])
        assert array.size < _IMMEDIATE_LIMIT, "long constants belong in the weight file"

        def make() -> Value:
            name = self.fresh(f"{kind}_const")
            return self._const(name, kind, array.shape, array_value(kind, array))

        return self._of_function((kind, array.shape, array.tobytes()), make)

    def fresh(self, name: str) -> str:
        """Returns the name, with a number added when it is taken."""
        found = name
        while found in self._names:
            self._counts[name] = self._counts.get(name, 0) + 1
            found = f"{name}_{self._counts[name]}"
        return found

    def message(self) -> Any:
        """The whole function, as a ``Function`` message."""
        return self._message

    def _named(self, name: str, dtype: str, shape: Shape) -> Value:
        # Operands refer to values by name, so a second value of the same name would be read in
        # place of the first, without an error.
        assert name not in self._names, f"{self.name} has two values called {name}"
        self._names.add(name)
        return Value(name, dtype, tuple(shape))

    def _operation(self, kind: str, name: str, results: Sequence[Value]) -> Any:
        operation = self._scopes[-1].block.operations.add(type=kind)
        operation.attributes["name"].CopyFrom(text_value(name))
        for value in results:
            operation.outputs.add(name=value.name, type=value_type(value.dtype, value.shape))
        return operation

    def _operand_names(self, operand: Operand) -> list[str]:
        if isinstance(operand, Value):
            return [operand.name]
        if isinstance(operand, list | tuple) and any(isinstance(one, Value) for one in operand):
            return [one.name for one in operand if isinstance(one, Value)]
        return [self.constant(operand).name]  # type: ignore[arg-type]
