"""The ``edgeforge::`` operators of a mixture of experts (Shazeer et al. 2017, arXiv 1701.06538).

As in `quant.program.ops`, the plain torch implementation of each DEFINES it. Shapes use its
letters; E is the number of experts, n the number of tokens that chose one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("edgeforge::route", mutates_args=())
def route(logits: Tensor, chosen: int, normalized: bool) -> Tensor:
    """Each token's weight of each expert: a softmax, of which the largest few are kept.

    Of equal logits the expert with the lower index goes first. Computed in float32.

    Args:
        logits: ``float[b, t, E]``, what the router computes.
        chosen: how many experts a token has.
        normalized: whether the kept weights are divided by their sum, as in Mixtral
            (arXiv 2401.04088).

    Returns:
        ``float[b, t, E]``, zero for the experts that a token did not choose.
    """
    shares = torch.softmax(logits.float(), -1)
    order = torch.sort(shares, dim=-1, descending=True, stable=True).indices[..., :chosen]
    kept = shares.gather(-1, order)
    if normalized:
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(shares).scatter(-1, order, kept).to(logits.dtype)


@route.register_fake
def _(logits: Tensor, chosen: int, normalized: bool) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("edgeforge::route_sparse_mixer", mutates_args=())
def route_sparse_mixer(logits: Tensor, jitter: float) -> Tensor:
    """As `route`, by SparseMixer's rule for inference (arXiv 2409.12136): two experts a token.

    The first is the expert of the largest logit, the second that of the largest among the others.
    The weight of each is its share in a softmax over the candidates whose distance from the
    largest, divided by the larger of their magnitude and the largest, is at most twice ``jitter``;
    the first is no candidate for the second. The two weights do not add up to 1.

    Args:
        logits: ``float[b, t, E]``, what the router computes.
        jitter: half of the largest relative distance.

    Returns:
        ``float[b, t, E]``, zero for the experts that a token did not choose.
    """
    scores = logits.float()
    made, left = torch.zeros_like(scores), scores
    for _ in range(2):
        largest = left.amax(-1, keepdim=True)
        # `argmax` may return any of several largest ones; a stable sort returns the first.
        index = torch.sort(left, dim=-1, descending=True, stable=True).indices[..., :1]
        # What the rule divides by is the largest logit itself where no magnitude exceeds it.
        far = (largest - scores) / torch.maximum(scores.abs(), largest) > 2 * jitter
        shares = torch.softmax(left.masked_fill(far, -torch.inf), -1)
        made = made.scatter(-1, index, shares.gather(-1, index))
        left = left.scatter(-1, index, -torch.inf)
    return made.to(logits.dtype)


@route_sparse_mixer.register_fake
def _(logits: Tensor, jitter: float) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op("edgeforge::chosen_tokens", mutates_args=())
def chosen_tokens(x: Tensor, weights: Tensor, expert: int) -> Tensor:
    """The tokens that chose an expert, in their order: ``float[1, t, i] -> float[1, n, i]``.

    Args:
        x: ``float[1, t, i]``.
        weights: ``float[1, t, E]``, what `route` gives; a token chose an expert where its weight is
            not zero.
        expert: the expert's index.
    """
    return x[:, weights[0, :, expert] != 0]


@chosen_tokens.register_fake
def _(x: Tensor, weights: Tensor, expert: int) -> Tensor:
    # `quant.program.expert_branches` says why the number of all tokens stands for n.
    return torch.empty_like(x)


@torch.library.custom_op("edgeforge::combine", mutates_args=())
def combine(weights: Tensor, results: Sequence[Tensor]) -> Tensor:
    """Adds up what the experts computed, each token's results times its weights of the experts.

    Args:
        weights: ``float[1, t, E]``, what `route` gives.
        results: ``float[1, n, o]`` for each expert, of the tokens that `chosen_tokens` gives.

    Returns:
        ``float[1, t, o]``; the experts are added in their order.
    """
    made = results[0].new_zeros(1, weights.shape[1], results[0].shape[-1])
    for expert, result in enumerate(results):
        factors = weights[0, :, expert]
        where = factors.nonzero()[:, 0]
        made[0].index_add_(0, where, result[0] * factors[where, None].to(result.dtype))
    return made


@combine.register_fake
def _(weights: Tensor, results: Sequence[Tensor]) -> Tensor:
    return results[0].new_empty(1, weights.shape[1], results[0].shape[-1])


def _slot(weights: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """The tokens that chose an expert, and the slot of each that the expert has: ``int64[n]``.

    A token's slots are its chosen experts in ascending order, from 0.
    """
    chosen = weights[0] != 0
    (where,) = chosen[:, expert].nonzero(as_tuple=True)
    return where, chosen.cumsum(-1)[where, expert] - 1


@torch.library.custom_op("edgeforge::slots", mutates_args=())
def slots(weights: Tensor, results: Sequence[Tensor], chosen: int, heads: int) -> Tensor:
    """Places what each token's experts computed side by side, head by head.

    A token has a slot for each expert that it chose, in the ascending order of the experts; a slot
    that no expert fills (a weight may be too small for float32) is zero. The first heads of all
    slots come first, then the second ones.

    Args:
        weights: ``float[1, t, E]``, what `route` gives.
        results: ``float[1, n, o]`` for each expert, of the tokens that `chosen_tokens` gives.
        chosen: how many experts a token has, and so slots.
        heads: how many heads the ``o`` columns of an expert are.

    Returns:
        ``float[1, t, chosen * o]``, whose columns are ``[heads, chosen, o / heads]``.
    """
    width, tokens = results[0].shape[-1] // heads, weights.shape[1]
    made = results[0].new_zeros(tokens, heads, chosen, width)
    for expert, result in enumerate(results):
        where, slot = _slot(weights, expert)
        made[where, :, slot] = result.view(len(where), heads, width)
    return made.flatten(1)[None]


@slots.register_fake
def _(weights: Tensor, results: Sequence[Tensor], chosen: int, heads: int) -> Tensor:
    return results[0].new_empty(1, weights.shape[1], chosen * results[0].shape[-1])


@torch.library.custom_op("edgeforge::chosen_slots", mutates_args=())
def chosen_slots(x: Tensor, weights: Tensor, expert: int, chosen: int, heads: int) -> Tensor:
    """An expert's own slots of the tokens that chose it, in the tokens' order.

    Args:
        x: ``float[1, t, chosen * o]``, laid out as `slots` returns it.
        weights: ``float[1, t, E]``, what `route` gives.
        expert: the expert's index.
        chosen: how many experts a token has.
        heads: how many heads an expert's columns are.

    Returns:
        ``float[1, n, o]``.
    """
    where, slot = _slot(weights, expert)
    width = x.shape[-1] // chosen
    own = x.reshape(x.shape[1], heads, chosen, width // heads)[where, :, slot]
    return own.reshape(1, len(where), width)


@chosen_slots.register_fake
def _(x: Tensor, weights: Tensor, expert: int, chosen: int, heads: int) -> Tensor:
    # As in `chosen_tokens`, the number of all tokens stands for n.
    return x.new_empty(*x.shape[:-1], x.shape[-1] // chosen)


@torch.library.custom_op("edgeforge::expert_queries", mutates_args=())
def expert_queries(x: Tensor, weights: Tensor, matrices: Tensor, chosen: int, heads: int) -> Tensor:
    """The queries of a mixture of attention heads (Zhang et al. 2022, arXiv 2210.05144).

    Like `experts`, it stands for products of the experts' own while a model is traced.

    Args:
        x: ``float[1, t, i]``.
        weights: ``float[1, t, E]``, what `route` gives.
        matrices: ``float[E, o, i]``.
        chosen: how many experts a token has.
        heads: how many heads an expert's queries are.

    Returns:
        ``float[1, t, chosen * o]``, as `slots`.
    """
    results = [F.linear(chosen_tokens(x, weights, e), each) for e, each in enumerate(matrices)]
    made: Tensor = slots(weights, results, chosen, heads)
    return made


@expert_queries.register_fake
def _(x: Tensor, weights: Tensor, matrices: Tensor, chosen: int, heads: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], chosen * matrices.shape[1])


@torch.library.custom_op("edgeforge::expert_outputs", mutates_args=())
def expert_outputs(x: Tensor, weights: Tensor, matrices: Tensor, chosen: int, heads: int) -> Tensor:
    """What a mixture of attention heads adds to the residual stream: each expert's own product.

    Like `experts`, it stands for products of the experts' own while a model is traced.

    Args:
        x: ``float[1, t, chosen * i]``, what attention gives for queries of `expert_queries`.
        weights: ``float[1, t, E]``, what `route` gives.
        matrices: ``float[E, o, i]``.
        chosen: how many experts a token has.
        heads: how many heads an expert's ``i`` columns are.

    Returns:
        ``float[1, t, o]``.
    """
    results = [
        F.linear(chosen_slots(x, weights, expert, chosen, heads), matrix)
        for expert, matrix in enumerate(matrices)
    ]
    made: Tensor = combine(weights, results)
    return made


@expert_outputs.register_fake
def _(x: Tensor, weights: Tensor, matrices: Tensor, chosen: int, heads: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], matrices.shape[1])


@torch.library.custom_op("edgeforge::experts", mutates_args=())
def experts(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    """A mixture's gated feed-forward parts: ``down(act(gate) * up)``, only where chosen.

    It stands for its experts while a model is traced. No program holds it:
    `quant.program.expert_branches.expand` writes it as `chosen_tokens`, the experts' own products
    and `combine`, so that every matrix of an expert is a weight like all others.

    Args:
        x: ``float[1, t, i]``.
        weights: ``float[1, t, E]``, what `route` gives.
        gate_up: ``float[E, 2 * f, i]``, in each expert's matrix the gate's rows first.
        down: ``float[E, o, f]``.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.

    Returns:
        ``float[1, t, o]``.
    """
    results = []
    for expert, (first, second) in enumerate(zip(gate_up, down, strict=True)):
        gate, up = F.linear(chosen_tokens(x, weights, expert), first).chunk(2, -1)
        if activation == "silu":
            gate = F.silu(gate)
        else:
            gate = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
        results.append(F.linear(gate * up, second))
    made: Tensor = combine(weights, results)
    return made


@experts.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], down.shape[1])
