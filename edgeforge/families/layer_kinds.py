"""What a configuration says of its layers one by one: kinds, windows, rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.spec import LayerSpec, ModelSpec
from quant.quoted import quoted

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
CONV: Final = "conv"
LINEAR: Final = "linear_attention"

_OLDER_NAMES: Final = {"attention": FULL, "mamba": LINEAR}


def kind_of(layer: LayerSpec) -> str:
    """Returns the name that ``layer_types`` has for a layer.

    >>> kind_of(LayerSpec(4, 2, 64, window=16)), kind_of(LayerSpec(4, 2, 64))
    ('sliding_attention', 'full_attention')
    """
    if layer.mixer == "short_conv":
        return CONV
    if layer.recurrence is not None:
        return LINEAR
    return SLIDING if layer.window else FULL


def read_kinds(
    config: ConfigReader,
    default: Sequence[str],
    allowed: Sequence[str] = (FULL, SLIDING),
    field: str = "layer_types",
) -> tuple[str, ...]:
    """Returns the kind of each layer, of ``layer_types`` or of the family's own rule.

    Kinds that older files name otherwise have the newer names.

    Args:
        config: the reader of ``config.json``.
        default: the kinds where the file has no list.
        allowed: the kinds that the family has.
        field: the field that lists them.

    Raises:
        CheckpointError: the list has another length, or a kind that is not implemented.
    """
    found = config.get(field)
    if found is None:
        return tuple(default)
    if not isinstance(found, list) or len(found) != len(default):
        raise CheckpointError(
            f"{config.where}: {field} must list {len(default)} kinds, one per layer"
        )
    for index, kind in enumerate(found):
        if newer_name(kind) not in allowed:
            raise CheckpointError(
                f"{config.where}: {field}[{index}] is {quoted(kind)}; EdgeForge implements "
                f"{' and '.join(map(repr, allowed))} here"
            )
    return tuple(str(newer_name(kind)) for kind in found)


def newer_name(kind: object) -> object:
    """Returns a layer's kind by the name that newer files have for it.

    >>> newer_name("mamba"), newer_name("sliding_attention")
    ('linear_attention', 'sliding_attention')
    """
    return _OLDER_NAMES.get(kind, kind) if isinstance(kind, str) else kind


def with_windows(
    spec: ModelSpec, kinds: Sequence[str], window: int, sliding_rope: int | None = 0
) -> ModelSpec:
    """Returns the spec with a window in each sliding layer.

    Args:
        spec: the spec, with no window in any layer.
        kinds: the kind of each layer.
        window: the window of sliding layers in tokens; 0 for none, which leaves the spec as it is.
        sliding_rope: the index of the rotary embedding of sliding layers.
    """
    layers = tuple(
        replace(layer, window=window, rope=sliding_rope) if kind == SLIDING else layer
        for layer, kind in zip(spec.layers, kinds, strict=True)
    )
    return replace(spec, layers=layers)
