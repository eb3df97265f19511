"""Keeps values between the operations of a Core ML function while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from device_harness.coreml_interpreter.steps import Step
from device_harness.session import Shown


class ValueWatch:
    """Watches runs (`device_harness.coreml_interpreter.steps.Watch`).

    Args:
        names: the operations' first results that are kept.

    Attributes:
        found: the results by name, one array for each call of a function.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.found: Shown = {name: [] for name in names}
        self._names = {f"{name!r})": name for name in names}

    def __call__(self, step: Step, arguments: dict[str, Any], results: list[Any]) -> None:
        """Keeps a copy of a step's result if it was asked for."""
        name = self._names.get(step.place.rpartition(" ")[2])
        if name is not None:
            self.found[name].append(results[0].detach().float().clone().numpy())
