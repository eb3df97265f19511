"""Reads what the functions of a Core ML package compute; see `exporters.lifted`."""

from __future__ import annotations

from typing import Final

from exporters.coreml.lifting import lift_function
from exporters.coreml.package import Package
from exporters.damaged_files import one_sentence
from exporters.lifted import Array, Precision, Reading

_PREFIX: Final = "edgeforge."


def read_package(
    package: Package, context: int, *, cache_multiple: int, floats: Precision = "float32"
) -> Reading:
    """Lifts every function of a package.

    Args:
        package: the opened package.
        context: the declared context, tokens.
        cache_multiple: what the caches' lengths are rounded up to a multiple of.
        floats: how products with weights that are float32 in every recipe take activations.

    Raises:
        ExportError: the package is damaged.
    """
    constants: dict[object, Array] = {}
    with one_sentence(package.path, "a Core ML package"):
        entry_points = tuple(
            lift_function(package, name, context, constants) for name in package.functions
        )
    told = package.metadata
    lengths = {
        f"metadata {key}": int(told[key]) for key in (f"{_PREFIX}context_length",) if key in told
    }
    fields = {"bos": f"{_PREFIX}bos_token_id", "eos": f"{_PREFIX}eos_token_ids"}
    ids = {
        name: tuple(int(part) for part in told.get(field, "").split(",") if part)
        for name, field in fields.items()
    }
    return Reading(
        entry_points,
        integers="float16",
        halves="float16",
        floats=floats,
        context=lengths,
        cache_multiple=cache_multiple,
        ids=ids,
    )
