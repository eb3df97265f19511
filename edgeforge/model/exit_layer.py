"""Cuts a model after one of its layers, with the last norm and the head behind it.

Models that were trained to exit early predict well from inner layers, too (LayerSkip, Elhoushi et
al. 2024). The cut program is an ordinary one of fewer layers: smaller, faster, and a draft model
for the whole one.
"""

from __future__ import annotations

from dataclasses import replace

from edgeforge.errors import UsageError
from edgeforge.families.spec import ModelSpec


def cut_after(spec: ModelSpec, layer: int) -> ModelSpec:
    """Returns the spec of the model that ends after a layer.

    The tensors of the layers that are left out are ignored where the checkpoint has them.

    Args:
        spec: the whole model's spec.
        layer: the last layer that is kept, counted from 1.

    Raises:
        UsageError: there is no such layer, or it is the last one.
    """
    count = len(spec.layers)
    if not 1 <= layer < count:
        raise UsageError(
            f"--exit-layer {layer} is not possible: this model has {count} layers and is cut after "
            f"one of its layers 1 to {count - 1}"
            if count > 1
            else f"--exit-layer {layer} is not possible: this model has only one layer"
        )
    left = {f"model.layers.{index}." for index in range(layer, count)}
    kept = {
        name: weight
        for name, weight in spec.weights.items()
        if not any(name.startswith(prefix) for prefix in left)
    }
    read = {piece.tensor for weight in kept.values() for piece in weight.pieces}
    unread = {
        piece.tensor
        for name, weight in spec.weights.items()
        if name not in kept
        for piece in weight.pieces
    }
    # A quantized layer has several tensors (codes, scales) under its module's name.
    ignored = [f"{tensor.rpartition('.')[0]}.*" for tensor in sorted(unread - read)]
    return replace(
        spec, layers=spec.layers[:layer], weights=kept, ignored=(*spec.ignored, *ignored)
    )
