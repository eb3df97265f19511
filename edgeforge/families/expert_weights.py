"""What the families of mixtures of experts share: their weights' names, counts and layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import matrix
from edgeforge.families.spec import LayerSpec, Piece, WeightSpec

LayerWeights = Callable[..., dict[str, WeightSpec]]

TRAINING = ("input_jitter_noise", "output_router_logits", "router_aux_loss_coef")
"""Fields that weigh a loss, or add noise, while a model is trained."""


@dataclass(frozen=True)
class ExpertNames:
    """A checkpoint's names of a layer's mixture, without ``.weight`` at the end.

    Attributes:
        block: the mixture's name within the layer.
        gate: an expert's matrix behind the activation function.
        up: an expert's matrix beside it.
        down: an expert's matrix that leads back to the residual stream.
        router: the matrix that chooses.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    router: str = "gate"


def with_experts(others: LayerWeights, names: ExpertNames) -> LayerWeights:
    """Returns a family's map of a layer's weights, with those of the mixture where it is one.

    Args:
        others: maps the layer's other weights, as `edgeforge.families.projections` does.
        names: the checkpoint's names of the mixture.
    """

    def layer_weights(
        index: int, layer: LayerSpec, *, hidden: int, head_dim: int
    ) -> dict[str, WeightSpec]:
        weights = others(index, layer, hidden=hidden, head_dim=head_dim)
        return weights | expert_weights(index, layer, hidden, names)

    return layer_weights


def expert_weights(
    index: int, layer: LayerSpec, hidden: int, names: ExpertNames
) -> dict[str, WeightSpec]:
    """Returns the weights of one layer's mixture by their names within the layer; none if dense.

    Args:
        index: the layer's number.
        layer: its dimensions.
        hidden: width of the residual stream.
        names: the checkpoint's names.
    """
    if not layer.experts:
        return {}
    at, ffn = f"model.layers.{index}.{names.block}.", layer.ffn_width
    router = (f"{at}{names.router}.weight", layer.experts)
    weights = {"mlp.router": matrix("router", hidden, router)}
    for expert in range(layer.experts):
        ours, theirs = f"mlp.experts.{expert}.", f"{at}experts.{expert}."
        gate, up, down = (f"{theirs}{name}.weight" for name in (names.gate, names.up, names.down))
        weights[f"{ours}gate_up_proj"] = matrix("linear", hidden, (gate, ffn), (up, ffn))
        weights[f"{ours}down_proj"] = matrix("linear", ffn, (down, hidden))
    return weights


def stacked(tensor: str, expert: int, experts: int, rows: int, columns: int) -> WeightSpec:
    """Returns one expert's matrix out of a tensor ``[experts, rows, columns]``.

    >>> stacked("down", 2, 8, 16, 4).pieces[0].tensor_shape
    (8, 16, 4)
    """
    piece = Piece(tensor, (rows, columns), expert * rows, experts * rows, experts)
    return WeightSpec(piece.shape, (piece,), "linear")


def read_counts(
    config: ConfigReader, experts: dict[str, int], chosen: tuple[str, int]
) -> tuple[int, int]:
    """Returns how many experts a layer has and how many of them each token has.

    Args:
        config: the reader of ``config.json``.
        experts: the fields that may say the experts' number, each with the family's default.
        chosen: the field of the number that a token has, and its default.

    Raises:
        CheckpointError: two fields say different numbers of experts, or a token has more experts
            than there are.
    """
    for field in TRAINING:
        config.get(field)
    given = [field for field in experts if config.get(field) is not None]
    field = given[0] if given else next(iter(experts))
    count = config.integer(field, experts[field])
    for other in given[1:]:
        if config.integer(other) != count:
            raise CheckpointError(
                f"{config.where}: {field} is {count} and {other} is {config.get(other)}; keep one"
            )
    each = config.integer(*chosen)
    if each > count:
        raise CheckpointError(
            f"{config.where}: {chosen[0]} is {each}, but {field} is only {count}: a token cannot "
            f"have more experts than there are"
        )
    return count, each


def every_layer(experts: int, chosen: int) -> Callable[[int, LayerSpec], LayerSpec]:
    """Returns what gives a layer its experts, in families whose every layer has them."""
    return lambda index, layer: replace(layer, experts=experts, chosen_experts=chosen)
