"""Binds a block of a program to the operations that run it, as a list of steps that is made once.

Constant arguments are converted here, so that a step only fetches the values that change. Large
weights are not dequantized until a step asks for them.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from device_harness.coreml_interpreter.arguments import Parameter, parameters, tensor_of
from device_harness.coreml_interpreter.limits import Limits
from device_harness.coreml_interpreter.ops.kinds import Making, Operation, Part, Tensors
from device_harness.coreml_interpreter.ops.slicing import slice_update_in_place
from device_harness.coreml_interpreter.registry import EXACT, OPS, VIEWS
from device_harness.coreml_interpreter.sharing import Sharing, share
from device_harness.coreml_interpreter.steps import InnerBlock, Program, Result, Step, first_line
from device_harness.coreml_interpreter.values import FLOATS, Precision, constant_tensor, storage
from device_harness.coreml_interpreter.weights import Budget, StoredWeight, Weight
from device_harness.errors import DeviceError
from exporters.coreml.constants import Constant, read_constant, read_text
from exporters.coreml.package import Package, tensor_type
from exporters.errors import ExportError

_LAZY_ELEMENTS: Final = 4096  # smaller constants are made at once
_Scope = ChainMap[str, int]  # an inner block's names, then those of the blocks around it


class Binder:
    """Binds one function.

    Args:
        package: the package.
        function: the function's name.
        precision: how floats are rounded.
        budget: the memory budget that all weights of the package share.
        weights: the weights made so far, by their place in the weight files; all functions of the
            package share them.
        limits: the limits on sizes and iterations.
    """

    def __init__(
        self,
        package: Package,
        function: str,
        precision: Precision,
        budget: Budget,
        weights: dict[object, Any],
        limits: Limits,
    ) -> None:
        self._package, self._function, self._precision = package, function, precision
        self._budget, self._weights, self._limits = budget, weights, limits
        self._program = Program()
        self._constants: dict[int, Any] = {}  # by slot: Constant, Weight or text
        self._count = 0

    def bind(self) -> Program:
        """Binds the function's block.

        Raises:
            DeviceError: the interpreter does not know an operation or a type.
            ExportError: a constant cannot be read.
        """
        function = self._package.function(self._function)
        block = self._package.block(self._function)
        scope: _Scope = ChainMap()
        for given in function.inputs:
            self._program.inputs[given.name] = self._declare(scope, given.name)
        sharing = share(block)
        self._program.steps = self._bind_block(block, scope, sharing, 0)
        for name in block.outputs:
            self._program.outputs.append((name, self._slot(scope, name, "an output")))
        return self._program

    def _bind_block(
        self, block: Any, scope: _Scope, sharing: Sharing | None, depth: int
    ) -> list[Step]:
        if depth > self._limits.depth:
            raise DeviceError(
                f"function {self._function} has blocks nested more than {self._limits.depth} deep"
            )
        steps = []
        for index, operation in enumerate(block.operations):
            place = self._place(operation)
            self._count += 1
            step = self._bind_one(operation, scope, place, depth)
            if step is None:
                continue
            if sharing is None:
                step.copies = operation.type in ("read_state", "coreml_update_state")
            else:
                step.copies = index in sharing.copied
                step.frees = tuple(scope[name] for name in sharing.freed.get(index, ()))
                if index in sharing.in_place:
                    step.run = slice_update_in_place
            steps.append(step)
        return steps

    def _bind_one(self, operation: Any, scope: _Scope, place: str, depth: int) -> Step | None:
        try:
            if operation.type == "const":
                self._bind_constant(operation, scope, place)
                return None
            return self._bind_operation(operation, scope, place, depth)
        except (DeviceError, ExportError):
            raise
        except (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
            # No converter writes such a program, so there is no better message than Python's own.
            raise DeviceError(f"{place} cannot be bound: {first_line(error)}") from error

    def _place(self, operation: Any) -> str:
        name = operation.outputs[0].name if operation.outputs else ""
        named = f" {name!r}" if name else ""
        return f"in function {self._function}, operation {self._count} ({operation.type}{named})"

    def _bind_constant(self, operation: Any, scope: _Scope, place: str) -> None:
        if "val" not in operation.attributes or not operation.outputs:
            raise DeviceError(f"{place} has no value or no name: the package was changed")
        value = operation.attributes["val"]
        slot = self._declare(scope, operation.outputs[0].name)
        self._keep(slot, self._constant(value, place))

    def _constant(self, value: Any, place: str) -> Any:
        """A constant's value: text, a `Constant`, or the message itself for lists and the like."""
        text = read_text(value)
        if text is not None:
            return text
        if value.immediateValue.WhichOneof("value") in ("list", "tuple", "dictionary"):
            return value
        constant = read_constant(self._package, value, place)
        storage(constant.dtype, place)
        return constant

    def _keep(self, slot: int, value: Any) -> None:
        self._constants[slot] = value
        self._program.initial[slot] = value

    def _usable(self, value: Any) -> Any:
        """A constant in the form that arguments take: a tensor, a large float weight, or text."""
        if not isinstance(value, Constant):
            return value
        if value.dtype in FLOATS and value.elements >= _LAZY_ELEMENTS:
            key = (value.data.ctypes.data, value.dtype, value.shape)
            if key not in self._weights:
                self._weights[key] = StoredWeight(value, self._budget)
            return self._weights[key]
        return constant_tensor(value)

    def _bind_operation(self, operation: Any, scope: _Scope, place: str, depth: int) -> Step | None:
        kind = str(operation.type)
        if kind not in OPS:
            raise DeviceError(f"{place}: the interpreter does not know the operation {kind}")
        run = OPS[kind]
        wanted = parameters(run)
        fixed: dict[str, Any] = {}
        dynamic: list[tuple[str, int | list[int], Callable[[Any], Any] | None]] = []
        given = self._arguments(operation, scope, place)
        for name, slots in given.items():
            if name not in wanted:
                raise DeviceError(f"{place}: the interpreter does not know its argument {name!r}")
            self._bind_argument(name, slots, wanted[name], fixed, dynamic, place)
        if "blocks" in wanted:
            fixed["blocks"] = [self._inner(block, scope, depth + 1) for block in operation.blocks]
        results = self._results(operation, scope, place)
        if "making" in wanted:
            half = bool(results) and results[-1].half
            fixed["making"] = Making(half, self._budget)
        missing = [
            name
            for name, parameter in wanted.items()
            if parameter.required and name not in given and name not in fixed
        ]
        if missing:
            raise DeviceError(f"{place} has no argument {' and no '.join(missing)}")
        if kind.startswith("constexpr_"):
            self._make_weight(run, fixed, dynamic, results, place)
            return None
        return Step(run, fixed, dynamic, results, (), False, place, kind in VIEWS)

    def _make_weight(
        self,
        run: Operation,
        fixed: dict[str, Any],
        dynamic: list[tuple[str, int | list[int], Callable[[Any], Any] | None]],
        results: list[Result],
        place: str,
    ) -> None:
        if dynamic:
            raise DeviceError(f"{place}: its argument {dynamic[0][0]} is no constant")
        key = (run, *sorted((name, _identity(value)) for name, value in fixed.items()))
        if key not in self._weights:
            try:
                self._weights[key] = run(**fixed)
            except DeviceError as error:
                raise DeviceError(f"{place}: {error}") from error
            except (RuntimeError, IndexError, ValueError, OverflowError) as error:
                raise DeviceError(f"{place}: {first_line(error)}") from error
        made = self._weights[key]
        for result, value in zip(
            results, made if isinstance(made, tuple) else (made,), strict=True
        ):
            if result.shape is not None and tuple(value.shape) != result.shape:
                raise DeviceError(
                    f"{place}: its result has shape {list(value.shape)} where the program says "
                    f"{list(result.shape)}"
                )
            self._keep(result.slot, value)

    def _arguments(self, operation: Any, scope: _Scope, place: str) -> dict[str, list[int]]:
        """The slots of each argument; iOS 16's weights have their arguments as attributes."""
        found: dict[str, list[int]] = {}
        for name in sorted(operation.inputs):
            found[name] = []
            for binding in operation.inputs[name].arguments:
                if binding.WhichOneof("binding") == "name":
                    found[name].append(self._slot(scope, binding.name, place))
                else:
                    found[name].append(self._new_slot())
                    self._keep(found[name][-1], self._constant(binding.value, place))
        for name in sorted(operation.attributes):
            if name != "name" and operation.type.startswith("constexpr_"):
                found[name] = [self._new_slot()]
                self._keep(found[name][0], self._constant(operation.attributes[name], place))
        return found

    def _bind_argument(
        self,
        name: str,
        slots: list[int],
        parameter: Parameter,
        fixed: dict[str, Any],
        dynamic: list[tuple[str, int | list[int], Callable[[Any], Any] | None]],
        place: str,
    ) -> None:
        several = parameter.kind == Tensors or len(slots) != 1
        if not all(slot in self._constants for slot in slots):
            for slot in slots:
                self._program.initial[slot] = self._usable(self._program.initial[slot])
            where = slots if several else slots[0]
            convert = None if parameter.kind is Tensor and not several else parameter.convert
            if convert is None and isinstance(where, int):
                convert = None if slots[0] not in self._constants else tensor_of
            dynamic.append((name, where, convert))
            return
        values = [self._constants[slot] for slot in slots]
        if "Making" in str(parameter.kind):
            raise DeviceError(f"{place}: the interpreter does not know its argument {name!r}")
        if parameter.kind is not Part:
            values = [self._usable(value) for value in values]
        try:
            value = values if several else values[0]
            if isinstance(value, Weight) and parameter.kind is Tensor:
                dynamic.append((name, slots[0], tensor_of))  # dequantized when the step runs
                self._program.initial[slots[0]] = value
                return
            fixed[name] = parameter.convert(value)
        except DeviceError as error:
            raise DeviceError(f"{place}: its argument {name} does not fit: {error}") from error

    def _results(self, operation: Any, scope: _Scope, place: str) -> list[Result]:
        found = []
        for output in operation.outputs:
            kind = tensor_type(output.type, place)
            dtype = storage(kind.dtype, place)
            if kind.elements > self._limits.elements:
                raise DeviceError(
                    f"{place} gives {kind}, more elements than the {self._limits.elements} that "
                    f"are allowed here"
                )
            half = (
                self._precision is Precision.FP16
                and kind.dtype == "fp16"
                and operation.type not in EXACT
            )
            fixed = tuple(dim for dim in kind.shape if dim is not None)
            shape = fixed if len(fixed) == len(kind.shape) else None
            found.append(Result(self._declare(scope, output.name), dtype, half, shape))
        return found

    def _inner(self, block: Any, scope: _Scope, depth: int) -> Callable[[list[Any]], list[Any]]:
        inner = scope.new_child()
        inputs = [self._declare(inner, given.name) for given in block.inputs]
        steps = self._bind_block(block, inner, None, depth)
        outputs = [self._slot(inner, name, "an output of a block") for name in block.outputs]
        return InnerBlock(self._program, steps, inputs, outputs)

    def _declare(self, scope: _Scope, name: str) -> int:
        scope[name] = self._new_slot()
        return scope[name]

    def _new_slot(self) -> int:
        self._program.initial.append(None)
        return len(self._program.initial) - 1

    def _slot(self, scope: _Scope, name: str, place: str) -> int:
        if name not in scope:
            raise DeviceError(f"{place}: there is no value {name!r} before it")
        return scope[name]


def _identity(value: Any) -> object:
    """A key that differs for different arguments of a weight."""
    if isinstance(value, Constant):
        return ("constant", value.data.ctypes.data, value.dtype, value.shape)
    if isinstance(value, Making):
        return ("making", value.half)
    return repr(value) if isinstance(value, str | int | tuple | float) else id(value)
