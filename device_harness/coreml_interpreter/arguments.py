"""Makes arguments of an operation from a program's values, as the operation's own types ask for.

An operation is a function whose parameters bear MIL's names and say by their annotations what they
take: a tensor, a weight that is made when needed, a number, a list of numbers, text.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import (
    Blocks,
    Ints,
    Making,
    Operation,
    Part,
    Tensors,
)
from device_harness.coreml_interpreter.states import State
from device_harness.coreml_interpreter.values import constant_tensor
from device_harness.coreml_interpreter.weights import MadeTensor, Weight
from device_harness.errors import DeviceError
from exporters.coreml.constants import Constant

Converter = Callable[[Any], Any]


@dataclass(frozen=True)
class Parameter:
    """What an operation takes under one name.

    Attributes:
        kind: the annotation, without None.
        convert: makes it of a program's value.
        required: whether there is no default.
    """

    kind: Any
    convert: Converter
    required: bool


@cache
def parameters(operation: Operation) -> dict[str, Parameter]:
    """What an operation takes, by name."""
    hints = typing.get_type_hints(operation)
    found = {}
    for name, parameter in inspect.signature(operation).parameters.items():
        kind = _without_none(hints[name])
        found[name] = Parameter(kind, _converter(kind), parameter.default is parameter.empty)
    return found


def tensor_of(value: Any) -> Tensor:
    """A tensor of whatever stands for one."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Weight):
        return value.tensor()
    if isinstance(value, Constant):
        return constant_tensor(value)
    raise DeviceError(f"a tensor is needed where there is {_told(value)}")


def _weight_of(value: Any) -> Weight:
    return value if isinstance(value, Weight) else MadeTensor(tensor_of(value))


def _number_of(kind: type) -> Converter:
    def convert(value: Any) -> Any:
        tensor = tensor_of(value)
        if tensor.numel() != 1:
            raise DeviceError(f"one number is needed where there are {tensor.numel()}")
        return kind(tensor.item())

    return convert


def _ints_of(value: Any) -> Ints:
    if isinstance(value, list):  # several scalars under one name
        return tuple(_number_of(int)(each) for each in value)
    tensor = tensor_of(value)
    if tensor.is_floating_point():
        raise DeviceError("integers are needed where there are floats")
    return tuple(tensor.reshape(-1).tolist())


def _text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise DeviceError(f"text is needed where there is {_told(value)}")
    return value


def _tensors_of(value: Any) -> Tensors:
    return [tensor_of(each) for each in (value if isinstance(value, list) else [value])]


def _state_of(value: Any) -> State:
    if not isinstance(value, State):
        raise DeviceError(f"a state is needed where there is {_told(value)}")
    return value


def _part_of(value: Any) -> Part:
    if not isinstance(value, Constant | Weight | Tensor):
        raise DeviceError(f"a constant is needed where there is {_told(value)}")
    return value


def _same(value: Any) -> Any:
    return value


_CONVERTERS: Final[dict[Any, Converter]] = {
    Tensor: tensor_of,
    Weight: _weight_of,
    int: _number_of(int),
    float: _number_of(float),
    bool: _number_of(bool),
    str: _text_of,
    Ints: _ints_of,
    Tensors: _tensors_of,
    State: _state_of,
    Part: _part_of,
    Blocks: _same,
    Making: _same,
}


def _converter(kind: Any) -> Converter:
    return _CONVERTERS[kind]


def _without_none(hint: Any) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        left = [each for each in typing.get_args(hint) if each is not types.NoneType]
        if len(left) == 1:
            return left[0]
        return Part if set(left) == set(typing.get_args(Part)) else hint
    return hint


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, State):
        return f"the state {value.name}"
    return "text" if isinstance(value, str) else f"a {type(value).__name__}"
