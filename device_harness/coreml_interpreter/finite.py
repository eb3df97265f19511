"""Finds the operation of a Core ML function that gives the first NaN or infinite value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from device_harness.coreml_interpreter.steps import Step
from device_harness.finite import described
from exporters.coreml.names import weight_name
from exporters.coreml.package import Package


class FiniteWatch:
    """Watches a run (`device_harness.coreml_interpreter.steps.Watch`).

    Attributes:
        found: the first step whose arguments are finite and whose result is not; None so far.
        is_half: whether that result was rounded to float16 and is infinite.
        function: the function that ran, which whoever calls it sets.
    """

    def __init__(self) -> None:
        self.found: Step | None = None
        self.is_half = False
        self.function: str | None = None

    def __call__(self, step: Step, arguments: dict[str, Any], results: list[Any]) -> None:
        """Looks at one step."""
        if self.found is not None or all(map(_is_finite, results)):
            return
        if all(_is_finite(value) for given in arguments.values() for value in _tensors(given)):
            self.found = step
            self.is_half = any(
                result.half and bool(torch.isinf(value).any())
                for result, value in zip(step.results, results, strict=True)
            )

    def origin(self, package: Package) -> str | None:
        """Returns a phrase for what was found, None for nothing."""
        if self.found is None:
            return None
        limit = "its result is beyond 65504, the largest float16" if self.is_half else ""
        weights: list[str] = []
        for operation in package.block(self.function).operations:
            for given in operation.inputs.values():
                names = [binding.name for binding in given.arguments]
                weights += [weight_name(name) for name in names if name.endswith("weight")]
            name = operation.outputs[0].name if operation.outputs else ""
            if name and f"({operation.type} {name!r})" in self.found.place:
                return described(f"{operation.type} {name!r}", weights, limit=limit)
        return described(self.found.place.removeprefix("in "), [], limit=limit)


def _is_finite(value: Any) -> bool:
    """Whether a value has no NaN and no infinity; an attention mask of 0 and -inf is meant so."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    bad = ~torch.isfinite(value)
    if not bool(bad.any()):
        return True
    return bool((value[bad] == -torch.inf).all()) and not bool(value[~bad].any())


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield from value
    else:
        yield value
