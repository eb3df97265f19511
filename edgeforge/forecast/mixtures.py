"""What a forecast says of a mixture of experts: what is stored, what a token reads, what fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeforge.families.expert_names import expert_of, token_share
from edgeforge.families.spec import ModelSpec
from quant.plans.plan import matrix_shape

if TYPE_CHECKING:
    from quant.plans.plan import QuantPlan


@dataclass(frozen=True)
class MixtureSizes:
    """The sizes of a mixture.

    Attributes:
        experts: how many experts a layer has; the most where layers differ.
        chosen: how many of them a token chooses.
        layers: how many layers are mixtures.
        parameters: parameters of all experts.
        active: parameters of the whole model that act on one token; of the embedding one row.
    """

    experts: int
    chosen: int
    layers: int
    parameters: int
    active: int

    def line(self, total: int) -> str:
        """A sentence about them.

        Args:
            total: parameters of the whole model.
        """
        return (
            f"mixture: {self.chosen} of {self.experts} experts act on a token in each of "
            f"{self.layers} layers, so {self.active / 1e9:.1f} of {total / 1e9:.1f} billion "
            f"parameters; all experts must be in memory, and decoding reads the chosen ones"
        )


def mixture_sizes(spec: ModelSpec) -> MixtureSizes | None:
    """Returns the sizes of a mixture; None for a dense model."""
    layers = [layer for layer in spec.layers if layer.experts]
    if not layers:
        return None
    largest = max(layers, key=lambda layer: layer.experts)
    parameters, active = 0, 0.0
    for name, weight in spec.weights.items():
        rows, columns = matrix_shape(weight.shape)
        count = rows * columns
        if weight.role == "embedding" and not spec.tied:
            active += columns
            continue
        active += token_share(spec, name) * count
        if expert_of(name) is not None:
            parameters += count
    return MixtureSizes(
        largest.experts, largest.chosen_experts, len(layers), parameters, round(active)
    )


def expert_bytes(plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the stored bytes of all experts' matrices with a plan."""
    return sum(
        given.format.nbytes(*matrix_shape(shapes[name]))
        for name, given in plan.weights.items()
        if expert_of(name) is not None
    )
