"""Finds the operation of a Core ML function that gives the first NaN or infinite value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from device_harness.coreml_interpreter.states import State
from device_harness.coreml_interpreter.steps import InnerBlock, Step
from device_harness.finite import described
from exporters.coreml.names import weight_name
from exporters.coreml.package import Package


class FiniteWatch:
    """Watches runs (`device_harness.coreml_interpreter.steps.Watch`).

    A value that is not finite may be dropped later, as the results of experts are that a token did
    not choose. So each such value is followed from the step that made it, and only one that
    reaches an output counts.

    Attributes:
        found: the step whose arguments are finite and whose result is not, and whose result an
            output comes from; None so far.
        is_half: whether that result was rounded to float16 and is infinite.
        function: the function that ran when it was found, or that runs now.
    """

    def __init__(self) -> None:
        self.found: Step | None = None
        self.is_half = False
        self.function: str | None = None
        self._outputs: frozenset[int] = frozenset()
        self._origins: dict[int, Step] = {}  # by slot
        self._states: dict[str, Step] = {}
        self._half: set[int] = set()  # the identities of steps whose result float16 cannot hold

    def begin(self, function: str, outputs: Iterable[int]) -> None:
        """Notes which function runs from now on, and the slots of its outputs."""
        if self.found is None:
            self.function, self._outputs = function, frozenset(outputs)
            self._origins.clear()

    def __call__(self, step: Step, arguments: dict[str, Any], results: list[Any]) -> None:
        """Looks at one step."""
        if self.found is not None:
            return
        self._note_state(step, arguments)
        if all(map(_is_finite, results)):
            for result in step.results:
                self._origins.pop(result.slot, None)
            return
        origin = self._origin(step, arguments)
        if origin is None:
            return
        if origin is step and _exceeds_half(step, results):
            self._half.add(id(step))
        for result, value in zip(step.results, results, strict=True):
            if not _is_finite(value):
                self._origins[result.slot] = origin
                if result.slot in self._outputs:
                    self.found, self.is_half = origin, id(origin) in self._half

    def _origin(self, step: Step, arguments: dict[str, Any]) -> Step | None:
        """The step from which a result comes that is not finite; None where it was given so."""
        slots = [
            slot
            for _, given, _ in step.dynamic
            for slot in ([given] if isinstance(given, int) else given)
        ]
        for block in arguments.get("blocks", ()):
            if isinstance(block, InnerBlock):
                slots += block.outputs
        for slot in slots:
            if slot in self._origins:
                return self._origins[slot]
        for value in arguments.values():
            if isinstance(value, State) and value.name in self._states:
                return self._states[value.name]
        finite = all(_is_finite(each) for given in arguments.values() for each in _values(given))
        return step if finite else None

    def _note_state(self, step: Step, arguments: dict[str, Any]) -> None:
        """Remembers where a state's content comes from that is not finite."""
        state, data = arguments.get("input"), arguments.get("data")
        if not isinstance(state, State) or data is None:
            return
        self._states.pop(state.name, None)
        slots = [given for name, given, _ in step.dynamic if name == "data"]
        if not _is_finite(data) and isinstance(slots[0], int) and slots[0] in self._origins:
            self._states[state.name] = self._origins[slots[0]]

    def origin(self, package: Package) -> str | None:
        """Returns a phrase for what was found, None for nothing."""
        if self.found is None:
            return None
        limit = "its result is beyond 65504, the largest float16" if self.is_half else ""
        weights: list[str] = []
        for operation in _in_order(package.block(self.function)):
            for given in operation.inputs.values():
                names = [binding.name for binding in given.arguments]
                weights += [weight_name(name) for name in names if name.endswith("weight")]
            name = operation.outputs[0].name if operation.outputs else ""
            if name and f"({operation.type} {name!r})" in self.found.place:
                return described(f"{operation.type} {name!r}", weights, limit=limit)
        return described(self.found.place.removeprefix("in "), [], limit=limit)


def _in_order(block: Any) -> Iterator[Any]:
    """A block's operations in the order in which they run; each follows those of its blocks."""
    for operation in block.operations:
        for inner in operation.blocks:
            yield from _in_order(inner)
        yield operation


def _exceeds_half(step: Step, results: list[Any]) -> bool:
    return any(
        result.half and bool(torch.isinf(value).any())
        for result, value in zip(step.results, results, strict=True)
    )


def _is_finite(value: Any) -> bool:
    """Whether a value has no NaN and no infinity; an attention mask of 0 and -inf is meant so."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return True
    return bool((value[bad] == -torch.inf).all()) and not bool(value[~bad].any())


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield from value
    else:
        yield value
