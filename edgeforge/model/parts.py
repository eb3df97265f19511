"""The pieces of which every layer of a decoder is made: weights, products and norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeforge.families.spec import ModelSpec
from quant.program import expert_ops, ops, token_ops


class Weights(nn.Module):
    """The weights of one part on the meta device: ``weight`` and ``bias``, None where not mapped.

    Args:
        spec: the model.
        at: the part's name, to which ``.weight`` and ``.bias`` are added.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, spec: ModelSpec, at: str) -> None:
        super().__init__()
        for part in ("weight", "bias"):
            given, made = spec.weights.get(f"{at}.{part}"), None
            if given is not None:
                empty = torch.empty(given.shape, device="meta")
                made = nn.Parameter(empty, requires_grad=False)
            self.register_parameter(part, made)


class Projection(Weights):
    """A product with a matrix, and its bias: ``float[1, t, i] -> float[1, t, o]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Transforms each token on its own."""
        made: Tensor = ops.linear(x, self.weight)
        return made if self.bias is None else token_ops.bias(made, self.bias)


class Norm(Weights):
    """The norm of the family's kind: ``float[1, t, n] -> float[1, t, n]``."""

    def __init__(self, spec: ModelSpec, at: str) -> None:
        super().__init__(spec, at)
        self.eps, self.kind = spec.norm_eps, spec.norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each token on its own."""
        if self.kind == "layer":
            made: Tensor = token_ops.layer_norm(x, self.weight, self.bias, self.eps)
        else:
            made = ops.rms_norm(x, self.weight, self.eps)
        return made


class StackedExperts(nn.Module):
    """The matrices of a layer's experts, each kind in one tensor while the model is traced.

    `quant.program.expert_branches.expand` parts them into the weights of the spec.

    Args:
        spec: the model.
        at: the experts' name, to which an expert's number and a matrix's name are added.
        count: how many experts there are.
        parts: the names of an expert's matrices, by which the parameters are called.
    """

    def __init__(self, spec: ModelSpec, at: str, count: int, parts: Sequence[str]) -> None:
        super().__init__()
        for part in parts:
            empty = torch.empty(count, *spec.weights[f"{at}.0.{part}.weight"].shape, device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))


def routed(spec: ModelSpec, logits: Tensor, chosen: int) -> Tensor:
    """Returns each token's weights of experts, by the rule of the model's routers.

    Args:
        spec: the model.
        logits: what a router computes, ``float[1, t, E]``.
        chosen: how many experts a token has.

    Returns:
        ``float[1, t, E]``, zero for the experts that a token did not choose.
    """
    if spec.router == "sparse_mixer":
        made: Tensor = expert_ops.route_sparse_mixer(logits, spec.router_jitter)
    else:
        made = expert_ops.route(logits, chosen, spec.router == "normalized_softmax")
    return made
