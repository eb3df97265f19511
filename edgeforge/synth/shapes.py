"""Lists the name and shape of every weight of a checkpoint from its config.json."""

from collections.abc import Mapping

from edgeforge.families.registry import read_spec


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
