"""What an artifact's manifest says about the rounding that a verification meets."""

from __future__ import annotations

from exporters.float_columns import ALL
from exporters.manifest import Manifest
from exporters.registry import find_target
from quant.formats.activations import NONE
from quant.formats.formats import IntFormat, parse_format


def rounds_activations(manifest: Manifest) -> bool:
    """Whether the artifact's kernels round activations that the plan leaves as they are."""
    if manifest.options.get("activations") == "float":
        return False
    return "activations" in find_target(manifest.target).options and any(
        isinstance(parse_format(record.format), IntFormat)
        and record.activation == NONE
        and record.float_columns != ALL
        for record in manifest.weights.values()
    )


def rounds_to_8_bits(manifest: Manifest) -> bool:
    """Whether an artifact rounds activations, keys or values to 8 bits, as planned or not."""
    planned = any(record.activation != NONE for record in manifest.weights.values())
    return planned or rounds_activations(manifest) or manifest.options.get("kv_cache") == "int8"


def worst_weights(manifest: Manifest) -> list[str]:
    """The three weights that rounding changed most, with their relative errors."""
    errors = sorted(((each.relative_error, name) for name, each in manifest.weights.items()))
    return [f"{name} {error:.2g}" for error, name in errors[:-4:-1] if error > 0]
