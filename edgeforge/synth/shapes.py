"""Lists the name and shape of every weight of a checkpoint from its config.json."""

import math
from collections.abc import Mapping

from edgeforge.families.registry import read_spec
from edgeforge.families.spec import WeightSpec


def tensor_shapes(config: Mapping[str, object]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of every weight, in the order of the model's layers.

    A tied head is absent.

    Args:
        config: a complete config.json of a known family.
    """
    shapes = {
        piece.tensor: piece.tensor_shape
        for weight in read_spec(config).weights.values()
        for piece in weight.pieces
    }
    return list(shapes.items())


def vector_centres(config: Mapping[str, object]) -> dict[str, float]:
    """Returns the number around which the elements of each vector lie, by its tensor's name.

    It is 0 for a bias and for the logarithm of a decay, 1 for a norm's scale, less what the norm
    adds to it, and a half for other factors. Steps of a recurrence lie around a hundredth, as in
    released models, so that it remembers about a hundred tokens.

    Args:
        config: a complete config.json of a known family.
    """
    return {
        piece.tensor: _centre(name, weight)
        for name, weight in read_spec(config).weights.items()
        if len(weight.shape) == 1 or weight.role == "gain"
        for piece in weight.pieces
    }


def _centre(name: str, weight: WeightSpec) -> float:
    if name.endswith((".dt_proj.bias", ".step.bias")):
        return math.log(math.expm1(0.01))  # softplus gives a hundredth
    if weight.role == "bias" or weight.form == "negative_exponential":
        return 0.0
    return 0.5 if weight.role == "gain" else 1.0 - weight.added
