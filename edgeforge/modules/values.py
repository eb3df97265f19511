"""Inputs and outputs of a module as flat lists of named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Final

import torch
from torch import nn

from edgeforge.errors import UsageError

_DTYPES: Final = (torch.float32, torch.int64, torch.int32, torch.bool)
_CONSTANTS: Final = (bool, int, float, str, type(None))
Example = torch.Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Arguments:
    """A module's example inputs.

    Attributes:
        tensors: the tensors by input name, in the order of the call.
        args: positional arguments; the name of an input in place of each tensor.
        kwargs: the same of keyword arguments.
    """

    tensors: Mapping[str, torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def call(self, module: nn.Module, tensors: Sequence[Any]) -> Any:
        """Calls a module with other tensors, in the order of ``tensors``."""
        held = dict(zip(self.tensors, tensors, strict=True))

        def found(value: Any) -> Any:
            return held[value.input] if isinstance(value, Slot) else value

        args = [found(value) for value in self.args]
        return module(*args, **{name: found(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class Slot:
    """The place of a tensor among the arguments of a call."""

    input: str


def read_arguments(module: nn.Module, example: Example) -> Arguments:
    """Names the tensors of example inputs after the parameters of ``forward``.

    Args:
        module: the module.
        example: a tensor, a sequence of positional arguments or a mapping of keyword arguments.
            Numbers, texts, None and booleans among them become constants of the artifact.

    Raises:
        UsageError: the inputs do not fit ``forward``, hold no tensor, or hold something else.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, torch.Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, Sequence) and not isinstance(example, str):
        args = tuple(example)
    else:
        raise UsageError(
            f"example inputs are a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"not {type(example).__name__}"
        )
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(module).__name__}.forward{signature}: {error}"
        ) from None
    tensors: dict[str, torch.Tensor] = {}
    given = [_slot(name, value, tensors) for name, value in _positional(bound, len(args))]
    named = {name: _slot(name, value, tensors) for name, value in kwargs.items()}
    if not tensors:
        raise UsageError("the example inputs hold no tensor: give at least one")
    return Arguments(tensors, tuple(given), named)


def _positional(bound: inspect.BoundArguments, count: int) -> Iterator[tuple[str, Any]]:
    """Names of positional arguments; those of ``*rest`` are ``rest_0``, ``rest_1``, ..."""
    listed: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            listed += [(f"{name}_{index}", each) for index, each in enumerate(value)]
        else:
            listed.append((name, value))
    return iter(listed[:count])


def _slot(name: str, value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, _CONSTANTS):
        return value
    if not isinstance(value, torch.Tensor):
        raise UsageError(
            f"the example input {name} is a {type(value).__name__}: inputs are tensors, and "
            f"numbers, texts, None and booleans stay constants"
        )
    if value.dtype not in _DTYPES:
        raise UsageError(
            f"the example input {name} is {_word(value.dtype)}; inputs are "
            f"{', '.join(map(_word, _DTYPES))}"
        )
    if value.device.type != "cpu":
        raise UsageError(f"the example input {name} is on {value.device}: move it to the CPU")
    tensors[name] = value
    return Slot(name)


def named_outputs(outputs: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Flattens what a module returned; None is left out.

    Tensors of mappings and dataclasses have the names of their keys and fields, those of sequences
    their numbers, and parts of parts are joined by ``_``. A single tensor is ``output``.

    Raises:
        UsageError: an output is no tensor.
    """
    if isinstance(outputs, torch.Tensor):
        if outputs.is_complex() or outputs.is_quantized or outputs.is_sparse:
            raise UsageError(f"the output {name or 'output'} is {outputs.dtype}: no runtime has it")
        yield name or "output", outputs
    elif outputs is None:
        return
    else:
        for key, value in _parts(outputs, name):
            part = (
                f"{name}_{key}" if name else str(key) if isinstance(key, str) else f"output_{key}"
            )
            yield from named_outputs(value, part)


def _parts(outputs: Any, name: str) -> list[tuple[Any, Any]]:
    if isinstance(outputs, Mapping):
        return list(outputs.items())
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return [(each.name, getattr(outputs, each.name)) for each in fields(outputs)]
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return list(zip(outputs._fields, outputs, strict=True))
    if isinstance(outputs, list | tuple):
        return list(enumerate(outputs))
    raise UsageError(
        f"the output {name or 'of forward'} is a {type(outputs).__name__}, not a tensor: return "
        f"tensors alone, in tuples, dicts or dataclasses"
    )


def unique(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Names in which only letters, digits and ``_`` occur, each different from all others."""
    found: list[str] = []
    for name in names:
        plain = "".join(letter if letter.isalnum() and letter.isascii() else "_" for letter in name)
        plain = f"_{plain}" if plain[:1].isdigit() else plain
        while plain in found or plain in taken:
            plain += "_out"
        found.append(plain)
    return found


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
