"""Steps, which are operations with bound arguments, and running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from device_harness.coreml_interpreter.arguments import tensor_of
from device_harness.coreml_interpreter.limits import spent
from device_harness.coreml_interpreter.ops.kinds import Operation
from device_harness.coreml_interpreter.values import round_to_half
from device_harness.errors import DeviceError
from exporters.errors import ExportError


@dataclass(slots=True)
class Result:
    """How an operation's output is stored.

    Attributes:
        slot: the slot that takes the output.
        dtype: PyTorch's dtype that holds it.
        half: whether it is rounded to float16.
        shape: the shape that the program states; None where the program leaves a dimension open.
    """

    slot: int
    dtype: Any
    half: bool
    shape: tuple[int, ...] | None


@dataclass(slots=True)
class Step:
    """One operation with its bound arguments.

    Attributes:
        run: the operation.
        fixed: the constant arguments, by name.
        dynamic: the other arguments: the name, the slot (or several), and the function that
            converts the slot's value to the argument, or None.
        results: how its outputs are stored.
        frees: the slots that no later step reads.
        copies: whether its result is copied, because the memory it shares will be overwritten.
        place: which operation it is, for errors.
        views: whether its results may lie in an argument's memory.
    """

    run: Operation
    fixed: dict[str, Any]
    dynamic: list[tuple[str, int | list[int], Callable[[Any], Any] | None]]
    results: list[Result]
    frees: tuple[int, ...]
    copies: bool
    place: str
    views: bool


@dataclass
class Program:
    """A function's block with bound operations.

    Attributes:
        initial: the value of each slot before the first step: a constant, or None.
        steps: the steps, in order.
        inputs: the slot of each input, by name.
        outputs: the name and the slot of each output.
    """

    initial: list[Any] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: dict[str, int] = field(default_factory=dict)
    outputs: list[tuple[str, int]] = field(default_factory=list)


Watch = Callable[[Step, dict[str, Any], list[Any]], None]
"""Called after a step with the step, its arguments and its results."""


def run_steps(steps: list[Step], slots: list[Any], watch: Watch | None = None) -> None:
    """Runs bound operations one after the other.

    Args:
        steps: the steps to run.
        slots: the values, which the steps read and write.
        watch: called after each step.

    Raises:
        DeviceError: a step fails; the message names its place.
    """
    counted = spent()
    for step in steps:
        arguments = dict(step.fixed)
        try:
            for name, slot, convert in step.dynamic:
                value = slots[slot] if isinstance(slot, int) else [slots[each] for each in slot]
                arguments[name] = value if convert is None else convert(value)
            made = step.run(**arguments)
            if not isinstance(made, tuple):
                made = (made,)
            for result, value in zip(step.results, made, strict=False):
                if value.dtype is not result.dtype:
                    value = value.to(result.dtype)
                if result.half:
                    value = round_to_half(value)
                if step.copies:
                    value = value.clone()
                if result.shape is not None and value.shape != result.shape:
                    raise DeviceError(
                        f"its result has shape {list(value.shape)} where the program says "
                        f"{list(result.shape)}"
                    )
                counted.made(result.slot, value, step.views)
                slots[result.slot] = value
        except (DeviceError, ExportError) as error:
            if str(error).startswith("in "):
                raise
            raise DeviceError(f"{step.place}: {error}") from error
        except MemoryError:
            raise DeviceError(f"{step.place}: there is not enough memory") from None
        except Exception as error:  # PyTorch raises errors of many classes for wrong arguments
            raise DeviceError(f"{step.place}: {first_line(error)}") from error
        if watch is not None:
            watch(step, arguments, [slots[result.slot] for result in step.results])
        for slot in step.frees:
            counted.freed(slot)
            slots[slot] = None


class InnerBlock:
    """An inner block, which runs on the slots of the function that contains it.

    Attributes:
        outputs: the slots of its outputs.
    """

    def __init__(
        self, program: Program, steps: list[Step], inputs: list[int], outputs: list[int]
    ) -> None:
        self._program, self._steps, self._inputs, self.outputs = program, steps, inputs, outputs
        self._made = [result.slot for step in steps for result in step.results]

    def __call__(self, values: list[Any]) -> list[Any]:
        """Runs the block on values for its inputs and returns the values of its outputs.

        Nothing else that the block makes is kept, for nobody outside can read it.
        """
        slots, watch = _RUNNING[id(self._program)]
        for slot, value in zip(self._inputs, values, strict=True):
            slots[slot] = value
        run_steps(self._steps, slots, watch)
        results = [tensor_of(slots[slot]) for slot in self.outputs]
        counted = spent()
        for slot in self._made:
            counted.freed(slot)
            slots[slot] = None
        return results


_RUNNING: dict[int, tuple[list[Any], Watch | None]] = {}


def run_program(program: Program, slots: list[Any], watch: Watch | None = None) -> None:
    """Runs a bound function on slots whose inputs are set."""
    _RUNNING[id(program)] = slots, watch
    try:
        run_steps(program.steps, slots, watch)
    finally:
        del _RUNNING[id(program)]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class's name where there is no message."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
