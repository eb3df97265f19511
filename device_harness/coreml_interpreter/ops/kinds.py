"""The types of arguments that operations take; a binder converts a program's values to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from device_harness.coreml_interpreter.weights import Budget, Weight
from exporters.coreml.constants import Constant

Ints = tuple[int, ...]
"""A list of integers or booleans, known when the operation runs."""

Tensors = list[Tensor]
"""Several tensors under one name."""

Operation = Callable[..., Any]
"""Takes its arguments by MIL's names; returns a tensor, or a tuple of them."""

Blocks = list[Callable[[list[Any]], list[Any]]]
"""An operation's inner blocks; each takes its inputs' values and returns its outputs' values."""

Part = Constant | Weight | Tensor
"""A constant as the package stores it, or the result of another operation on constants."""


@dataclass(frozen=True)
class Making:
    """What an operation that makes a weight needs besides its arguments.

    Attributes:
        half: whether its result is rounded to float16.
        budget: the budget that the package's weights share.
    """

    half: bool
    budget: Budget
