"""`Interpreter`: runs the functions of a Core ML package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from device_harness.coreml_interpreter.arguments import tensor_of
from device_harness.coreml_interpreter.binding import Binder
from device_harness.coreml_interpreter.limits import Limits, check_states, limited
from device_harness.coreml_interpreter.states import State
from device_harness.coreml_interpreter.steps import Program, Watch, run_program
from device_harness.coreml_interpreter.values import (
    Precision,
    given_tensor,
    outside,
    round_to_half,
    storage,
)
from device_harness.coreml_interpreter.weights import Budget
from device_harness.errors import DeviceError
from exporters.coreml.package import Feature, Package, TensorType, tensor_type

BUDGET = 256 << 20
"""The default budget: how many bytes of dequantized weights are kept in memory."""

Outputs = dict[str, npt.NDArray[Any]]
States = dict[str, State]


class Interpreter:
    """Runs a package's functions; each is bound when it first runs.

    Args:
        package: the package.
        precision: how floats are rounded.
        budget: how many bytes of dequantized weights are kept in memory.
        limits: the limits on sizes and iterations; by default those of `Limits`.
    """

    def __init__(
        self,
        package: Package,
        precision: Precision = Precision.FP16,
        budget: int = BUDGET,
        limits: Limits | None = None,
    ) -> None:
        self.package, self.precision = package, precision
        self._limits = limits or Limits()
        self._budget = Budget(budget)
        self._weights: dict[object, Any] = {}
        self._programs: dict[str, Program] = {}
        self._signatures: dict[str, _Signature] = {}

    def inputs(self, function: str | None = None) -> dict[str, TensorType]:
        """The types of a function's inputs in the program, without its states."""
        return {name: kind for name, (state, kind) in self._given(function).items() if not state}

    def states(self, function: str | None = None) -> dict[str, TensorType]:
        """The types of a function's states in the program."""
        return {name: kind for name, (state, kind) in self._given(function).items() if state}

    def outputs(self, function: str | None = None) -> dict[str, TensorType]:
        """The types of a function's outputs in the program."""
        block = self.package.block(function)
        found = {}
        kinds = {
            output.name: output.type
            for operation in block.operations
            for output in operation.outputs
        }
        kinds.update({given.name: given.type for given in self.package.function(function).inputs})
        for name in block.outputs:
            if name not in kinds:
                raise DeviceError(f"the function has an output {name!r} but no value of that name")
            found[str(name)] = tensor_type(kinds[name], f"the output {name!r}")
        return found

    def make_states(self, function: str | None = None) -> States:
        """Makes a function's states, all zeros; other functions with the same states can use them.

        Raises:
            DeviceError: a state is too large, or its type is unknown.
        """
        kinds = self.states(function)
        with limited(self._limits):
            check_states(
                (tuple(dim or 0 for dim in kind.shape) for kind in kinds.values()),
                (storage(kind.dtype, f"state {name}").itemsize for name, kind in kinds.items()),
            )
            return {name: State(name, kind) for name, kind in kinds.items()}

    def bind(self, function: str | None = None) -> Program:
        """Binds a function, if that is not done yet, and returns its steps.

        Raises:
            DeviceError: the interpreter does not know an operation, an argument or a type.
            ExportError: a constant cannot be read.
        """
        name = self.package.default_function if function is None else function
        if name not in self._programs:
            binder = Binder(
                self.package, name, self.precision, self._budget, self._weights, self._limits
            )
            with limited(self._limits), torch.inference_mode():
                self._programs[name] = binder.bind()
        return self._programs[name]

    def run(
        self,
        inputs: Mapping[str, npt.ArrayLike],
        function: str | None = None,
        states: Mapping[str, State] | None = None,
        watch: Watch | None = None,
    ) -> Outputs:
        """Calls a function.

        Args:
            inputs: the inputs by name, with the shapes and types that `inputs` states.
            function: the function's name; None for the package's default function.
            states: the states from `make_states`; the call changes them, and the next call reads
                them.
            watch: called after each operation, those of the inner blocks that run included.

        Returns:
            The outputs by name, in NumPy's type of the same name; float16 outputs are float32 in
            `Precision.FP32`.

        Raises:
            DeviceError: an input or a state is missing or does not fit, or an operation fails.
        """
        name = self.package.default_function if function is None else function
        kinds = self._signature(name).outputs
        with limited(self._limits), torch.inference_mode():
            program = self.bind(name)
            slots = list(program.initial)
            for given, value in self._fitting(name, inputs, states or {}).items():
                slots[program.inputs[given]] = value
            run_program(program, slots, watch)
            return {
                output: outside(tensor_of(slots[slot]), kinds[output].dtype, self.precision)
                for output, slot in program.outputs
            }

    def _signature(self, function: str) -> _Signature:
        if function not in self._signatures:
            described = self.package.interface(function).inputs
            self._signatures[function] = _Signature(
                self.inputs(function),
                self.states(function),
                self.outputs(function),
                {feature.name: feature for feature in described},
            )
        return self._signatures[function]

    def _given(self, function: str | None) -> dict[str, tuple[bool, TensorType]]:
        return {
            str(given.name): (
                given.type.WhichOneof("type") == "stateType",
                tensor_type(given.type, f"the input {given.name!r}"),
            )
            for given in self.package.function(function).inputs
        }

    def _fitting(
        self, function: str, inputs: Mapping[str, npt.ArrayLike], states: Mapping[str, State]
    ) -> dict[str, Any]:
        signature = self._signature(function)
        wanted = signature.inputs
        unknown = sorted(set(inputs) - set(wanted))
        if unknown:
            raise DeviceError(
                f"function {function} has no input {unknown[0]!r}; it has {_listed(wanted)}"
            )
        values: dict[str, Any] = {}
        for name, kind in wanted.items():
            if name not in inputs:
                raise DeviceError(f"function {function} needs the input {name!r}, which is {kind}")
            where = f"the input {name!r} of function {function}"
            tensor = given_tensor(inputs[name], kind.dtype, where)
            _check_shape(tuple(tensor.shape), kind, signature.described.get(name), where)
            if kind.dtype == "fp16" and self.precision is Precision.FP16:
                tensor = round_to_half(tensor)
            values[name] = tensor
        for name, kind in signature.states.items():
            if name not in states:
                raise DeviceError(
                    f"function {function} uses the state {name!r}, which was not given: make its "
                    f"states by make_states and give them to each call"
                )
            if states[name].kind != kind:
                raise DeviceError(
                    f"the state {name!r} is {states[name].kind}; function {function} needs {kind}"
                )
            values[name] = states[name]
        return values


@dataclass(frozen=True)
class _Signature:
    """The types of what a function takes and gives, read once.

    Attributes:
        inputs: the types of its inputs, by name.
        states: the types of its states, by name.
        outputs: the types of its outputs, by name.
        described: the inputs as the model's description states them, by name.
    """

    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    outputs: dict[str, TensorType]
    described: dict[str, Feature]


def _check_shape(
    found: tuple[int, ...], kind: TensorType, feature: Feature | None, where: str
) -> None:
    fits = len(found) == len(kind.shape) and all(
        dim in (None, size) for dim, size in zip(kind.shape, found, strict=True)
    )
    if not fits:
        raise DeviceError(f"{where} has shape {list(found)}; it must be {kind}")
    if feature is None:
        return
    if feature.shapes and None in kind.shape and found not in feature.shapes:
        allowed = " or ".join(str(list(shape)) for shape in feature.shapes)
        raise DeviceError(f"{where} has shape {list(found)}; it must be one of {allowed}")
    if len(feature.ranges) == len(found):
        for size, (low, high) in zip(found, feature.ranges, strict=True):
            if size < low or (high is not None and size > high):
                raise DeviceError(f"{where} has shape {list(found)}; it must be {feature}")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "none"
