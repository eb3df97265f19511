"""What a forecast says of a mixture of experts: what is stored, what a token reads, what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        experts: how many experts a layer's feed-forward part has; the most where layers differ.
        chosen: how many of them a token chooses.
        layers: in how many layers that part is a mixture.
        parameters: parameters of all experts.
        active: parameters of the whole model that act on one token; of the embedding one row.
        attention_experts: how many experts a layer's attention has; the most where layers differ.
        chosen_attention_experts: how many of them a token chooses.
        attention_layers: in how many layers attention is a mixture.
    """

    experts: int
    chosen: int
    layers: int
    parameters: int
    active: int
    attention_experts: int = 0
    chosen_attention_experts: int = 0
    attention_layers: int = 0

    def line(self, total: int) -> str:
        """A sentence about them.

        Args:
            total: parameters of the whole model.
        """
        kinds = (
            ("", self.chosen, self.experts, self.layers),
            (
                "attention ",
                self.chosen_attention_experts,
                self.attention_experts,
                self.attention_layers,
            ),
        )
        acting = " and ".join(
            f"{chosen} of {experts} {kind}experts in each of {layers} layers"
            for kind, chosen, experts, layers in kinds
            if layers
        )
        return (
            f"mixture: {acting} act on a token, so {self.active / 1e9:.1f} of {total / 1e9:.1f} "
            f"billion parameters; all experts must be in memory, and decoding reads the chosen ones"
        )


def mixture_sizes(spec: ModelSpec) -> MixtureSizes | None:
    """Returns the sizes of a mixture; None for a dense model."""
    if not spec.mixture:
        return None
    parts = [(each.experts, each.chosen_experts) for each in spec.layers]
    heads = [(each.attention_experts, each.chosen_attention_experts) for each in spec.layers]
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
    experts, chosen, layers = _counts(parts)
    return MixtureSizes(experts, chosen, layers, parameters, round(active), *_counts(heads))


def _counts(layers: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Returns the most experts of a layer, how many of them a token has, and the mixtures' number.

    >>> _counts([(0, 0), (8, 2), (4, 1)])
    (8, 2, 2)
    """
    return (*max(layers), sum(experts > 0 for experts, _ in layers))


def expert_bytes(plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the stored bytes of all experts' matrices with a plan."""
    return sum(
        given.format.nbytes(*matrix_shape(shapes[name]))
        for name, given in plan.weights.items()
        if expert_of(name) is not None
    )
