"""The weights of a mixture of experts, by the names that checkpoints give them."""

from __future__ import annotations

from dataclasses import dataclass

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import matrix
from edgeforge.families.spec import LayerSpec, WeightSpec


@dataclass(frozen=True)
class ExpertNames:
    """A checkpoint's names of a layer's mixture, without ``.weight`` at the end.

    Attributes:
        block: the mixture's name within the layer.
        gate: an expert's matrix behind the activation function.
        up: an expert's matrix beside it.
        down: an expert's matrix that leads back to the residual stream.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def expert_weights(
    index: int, layer: LayerSpec, hidden: int, names: ExpertNames
) -> dict[str, WeightSpec]:
    """Returns the weights of one layer's mixture by their names within the layer.

    Args:
        index: the layer's number.
        layer: its dimensions.
        hidden: width of the residual stream.
        names: the checkpoint's names.
    """
    at, ffn = f"model.layers.{index}.{names.block}.", layer.ffn_width
    weights = {"mlp.router": matrix("router", hidden, (f"{at}gate.weight", layer.experts))}
    for expert in range(layer.experts):
        ours, theirs = f"mlp.experts.{expert}.", f"{at}experts.{expert}."
        gate, up, down = (f"{theirs}{name}.weight" for name in (names.gate, names.up, names.down))
        weights[f"{ours}gate_up_proj"] = matrix("linear", hidden, (gate, ffn), (up, ffn))
        weights[f"{ours}down_proj"] = matrix("linear", ffn, (down, hidden))
    return weights


def read_counts(
    config: ConfigReader, experts: tuple[str, int], chosen: tuple[str, int]
) -> tuple[int, int]:
    """Returns how many experts a layer has and how many of them each token has.

    Args:
        config: the reader of ``config.json``.
        experts: the field of the experts' number, and its default.
        chosen: the field of the number that a token has, and its default.

    Raises:
        CheckpointError: a token has more experts than there are.
    """
    count, each = (config.integer(*field, minimum=1) for field in (experts, chosen))
    if each > count:
        raise CheckpointError(
            f"{config.where}: {chosen[0]} is {each}, but {experts[0]} is only {count}"
        )
    return count, each
