"""Inputs to verify an artifact on, and what the float and the quantized module give for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from edgeforge.arrays_file import read_arrays
from edgeforge.errors import UsageError
from exporters.modules.integer_program import values_of
from exporters.modules.traced import PREFIX, ModuleValue, TracedModule
from quant.store.store import WeightStore

Arrays = dict[str, npt.NDArray[Any]]
_KINDS: Final = ("input", "float", "quantized")


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
        inputs: by input name.
        floats: what the float module gives, by output name.
        quantized: what the module with dequantized weights gives, by output name.
    """

    inputs: Arrays
    floats: Arrays
    quantized: Arrays


def samples_of(
    traced: TracedModule, store: WeightStore | None, given: Sequence[Arrays], seed: int = 0
) -> list[Sample]:
    """Runs the module on given inputs, or on the example inputs and random ones.

    Random integers are drawn from the example's own values, because a table may have no other
    rows; those that are only 0 and 1 keep their pattern, as masks do. Random floats have the
    example's mean and deviation. Their dynamic dimensions have another size than the example's.

    Raises:
        UsageError: given inputs do not fit the module.
    """
    calls = checked_calls(traced, given)
    if not given:
        calls.append(_random(traced, seed))
    floats = [_run(traced, None, call) for call in calls]
    found = floats if store is None else [_run(traced, store, call) for call in calls]
    names = [value.name for value in traced.outputs]
    return [
        Sample(
            {name: tensor.detach().cpu().numpy() for name, tensor in call.items()},
            dict(zip(names, first, strict=True)),
            dict(zip(names, second, strict=True)),
        )
        for call, first, second in zip(calls, floats, found, strict=True)
    ]


def checked_calls(traced: TracedModule, given: Sequence[Arrays]) -> list[dict[str, torch.Tensor]]:
    """Given inputs as tensors in the order of the module's inputs, or else the example inputs.

    Raises:
        UsageError: given inputs do not fit the module.
    """
    example = dict(zip(_names(traced), traced.examples, strict=True))
    return [_checked(traced, each) for each in given] or [example]


def _names(traced: TracedModule) -> list[str]:
    return [value.name for value in traced.inputs]


def _run(
    traced: TracedModule, store: WeightStore | None, call: Mapping[str, torch.Tensor]
) -> list[npt.NDArray[Any]]:
    """Runs the traced program; quantized weights take their values from the store."""
    module = traced.program.module(check_guards=False)
    if store is not None:
        for name in store.plan.weights:
            path, _, leaf = f"{PREFIX}{name}".rpartition(".")
            value = torch.nn.Parameter(values_of(store, traced.weights[name]), requires_grad=False)
            setattr(module.get_submodule(path), leaf, value)
    with torch.no_grad():
        return [each.detach().numpy() for each in module(*call.values())]


def _random(traced: TracedModule, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes: dict[str, int] = {}
    for value, example in zip(traced.inputs, traced.examples, strict=True):
        for dim, size in zip(value.dims, example.shape, strict=True):
            if isinstance(dim, str):
                least, most = traced.ranges[dim]
                sizes[dim] = size - 1 if size > least else size + (most is None or size < most)
    found = {}
    for value, example in zip(traced.inputs, traced.examples, strict=True):
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in value.dims]
        found[value.name] = _drawn(example, shape, draw)
    return found


def _drawn(example: torch.Tensor, shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
    if example.is_floating_point():
        spread = example.std() if example.numel() > 1 else torch.tensor(1.0)
        return torch.randn(list(shape), generator=draw) * spread + example.mean()
    if not example.numel():
        return torch.zeros(list(shape), dtype=example.dtype)
    if bool(((example == 0) | (example == 1)).all()):
        for axis, size in enumerate(shape):
            example = example.index_select(axis, torch.arange(size) % example.shape[axis])
        return example.contiguous()
    places = torch.randint(example.numel(), list(shape), generator=draw)
    return example.flatten()[places]


def _checked(traced: TracedModule, given: Arrays) -> dict[str, torch.Tensor]:
    """Given inputs as tensors, in the order of the module's inputs.

    Raises:
        UsageError: one is missing, unknown, or has another dtype or shape.
    """
    strangers = sorted(given.keys() - set(_names(traced)))
    if strangers:
        raise UsageError(
            f"the given inputs hold {strangers[0]!r}; the module's are {', '.join(_names(traced))}"
        )
    sizes: dict[str, int] = {}
    found = {}
    for value in traced.inputs:
        if value.name not in given:
            raise UsageError(f"the given inputs lack {value.name}, which is {value.text}")
        array = given[value.name]
        if str(array.dtype) != value.dtype or not _fits(value, array.shape, sizes, traced):
            raise UsageError(
                f"the given input {value.name} is {array.dtype}{list(array.shape)}; the module "
                f"takes {value.text}"
            )
        found[value.name] = torch.from_numpy(array)
    return found


def _fits(
    value: ModuleValue, shape: tuple[int, ...], sizes: dict[str, int], traced: TracedModule
) -> bool:
    if len(shape) != len(value.dims):
        return False
    for dim, size in zip(value.dims, shape, strict=True):
        if isinstance(dim, int):
            if dim != size:
                return False
            continue
        least, most = traced.ranges[dim]
        if sizes.setdefault(dim, size) != size or size < least or (most or size) < size:
            return False
    return True


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Writes samples as an ``.npz`` file."""
    arrays = {
        f"{number}/{kind}/{name}": array
        for number, sample in enumerate(samples)
        for kind, held in zip(_KINDS, _parts(sample), strict=True)
        for name, array in held.items()
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]


def _parts(sample: Sample) -> tuple[Arrays, Arrays, Arrays]:
    return sample.inputs, sample.floats, sample.quantized


def read_samples(path: Path) -> list[Sample]:
    """Reads what `write_samples` wrote.

    Raises:
        UsageError: the file is missing or holds something else.
    """
    found: dict[int, dict[str, Arrays]] = {}
    for key, array in read_arrays(path).items():
        number, _, rest = key.partition("/")
        kind, _, name = rest.partition("/")
        if not number.isdecimal() or kind not in _KINDS or not name:
            raise UsageError(f"{path} holds {key!r}, which no sample has")
        found.setdefault(int(number), {each: {} for each in _KINDS})[kind][name] = array
    return [Sample(*(found[number][kind] for kind in _KINDS)) for number in sorted(found)]
