"""What an adapter adds to the weights of a program, as two thin matrices for each.

A program's weight may stack several of the checkpoint's: its factors then lie beside each other,
``A = [A_q, A_k]`` and ``B = diag(B_q, B_k)``, so that one pair serves the stacked product.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgeforge.checkpoint.adapter import Adapter, read_floats
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.families.spec import WeightSpec
from edgeforge.model.adaptation import Adaptation, Change, adapt
from edgeforge.model.model import Model
from exporters.adapters import check_separate
from quant.formats.activations import NONE

if TYPE_CHECKING:
    import torch

    from exporters.adapter_pair import Pair

_ROLES = ("linear", "head")
# A mixture's experts see other tokens each, in branches, delegates or kernels of their own.
_EXPERTS: Final = re.compile(r"\.experts\.[0-9]+\.")


@dataclass(frozen=True)
class SeparateAdapter:
    """An adapter that is to lie beside the weights, and what it adds to them by name."""

    adapter: Adapter
    pairs: dict[str, Pair]


def check_adapters(
    model: Model,
    adapters: Sequence[Adapter],
    targets: Iterable[str],
    options: Mapping[str, object],
) -> list[SeparateAdapter]:
    """Refuses, before any work, adapters that cannot lie beside the weights.

    Args:
        model: the base.
        adapters: the adapters.
        targets: names of the targets.
        options: the targets' options that the user set, by name.

    Raises:
        CheckpointError: an adapter is of another model, or changes what no pair of factors can.
        ExportError: a target's files hold no adapters.
        UsageError: two adapters have one name.
    """
    names = [adapter.name for adapter in adapters]
    for name in names:
        for target in targets:
            check_separate(target, name, options)
        if names.count(name) > 1:
            raise UsageError(
                f"two adapters are named {name}, and each is switched on by its name: rename the "
                f"folder of one"
            )
    return [SeparateAdapter(adapter, low_rank(model, adapter)) for adapter in adapters]


def refuse_rounded(
    adapters: Sequence[SeparateAdapter], recipe: str, activations: Mapping[str, str]
) -> None:
    """Refuses adapters of products whose activations the recipe rounds.

    Args:
        adapters: the adapters.
        recipe: the recipe's name.
        activations: how activations are rounded, by the weight's name.

    Raises:
        UsageError: names a weight.
    """
    for each in adapters:
        for name in each.pairs:
            if activations[name] != NONE:
                raise UsageError(
                    f"the recipe {recipe} rounds what {name} multiplies to 8 bits, and an adapter "
                    f"beside the weights takes it unrounded: use a recipe that rounds weights "
                    f"alone, or leave --adapter-mode out, and the adapter is merged"
                )


def adaptable(model: Model) -> list[str]:
    """Returns the weights that an adapter can change beside the base.

    They are those of products that every token has: no embeddings, and no mixture's experts.
    """
    return [
        name
        for name, weight in model.spec.weights.items()
        if weight.role in _ROLES and not _EXPERTS.search(name)
    ]


def low_rank(model: Model, adapter: Adapter) -> dict[str, Pair]:
    """Returns what an adapter adds, by the weight's name.

    Args:
        model: the base.
        adapter: the adapter.

    Returns:
        ``A: float32[in, rank]`` and ``B: float32[rank, out]``, which holds scale and weight.

    Raises:
        CheckpointError: the adapter is of another model, or changes what no pair of factors can.
    """
    apart = f"the adapter {adapter.source} changes"
    advice = "which cannot lie beside the weights: leave --adapter-mode out to merge it"
    if adapter.replaced:
        raise CheckpointError(f"{apart} {next(iter(adapter.replaced))} as a whole, {advice}")
    for module, factors in adapter.factors.items():
        if factors.magnitude is not None:
            raise CheckpointError(f"{apart} {module} by DoRA, {advice}")
    spec, found = adapt([adapter], model.checkpoint, model.spec, plain=True)
    allowed = set(adaptable(model))
    pairs: dict[str, Pair] = {}
    for name, weight in spec.weights.items():
        changed = [piece.tensor for piece in weight.pieces if piece.tensor in found.changes]
        if not changed:
            continue
        if _EXPERTS.search(name):
            raise CheckpointError(f"{apart} {changed[0]}, of a mixture's experts, {advice}")
        if weight.role == "router":
            raise CheckpointError(f"{apart} {changed[0]}, of a mixture's router, {advice}")
        if name not in allowed or spec.tied != model.spec.tied:
            raise CheckpointError(f"{apart} {changed[0]}, the embedding or the head, {advice}")
        pairs[name] = _stacked(weight, found, adapter)
    return pairs


def _stacked(weight: WeightSpec, found: Adaptation, adapter: Adapter) -> Pair:
    import torch

    # Two pieces of one tensor, as of fused queries and keys, share its ``A``.
    downs: dict[str, torch.Tensor] = {}
    ups: dict[str, torch.Tensor] = {}
    row = 0
    for piece in weight.pieces:
        for change in found.changes.get(piece.tensor, ()):
            if piece.tensor not in ups:
                downs[piece.tensor] = _down(change)
                ups[piece.tensor] = torch.zeros(weight.shape[0], change.factors.rank)
            rows = read_floats(
                adapter.tensors, change.factors.up, piece.first, piece.first + piece.shape[0]
            )
            scale = change.factors.scale * adapter.weight
            ups[piece.tensor][row : row + piece.shape[0]] = rows * scale
        row += piece.shape[0]
    down, up = torch.cat(list(downs.values())), torch.cat(list(ups.values()), 1)
    return down.T.contiguous().numpy(), up.T.contiguous().numpy()


def _down(change: Change) -> torch.Tensor:
    return read_floats(change.adapter.tensors, change.factors.down, 0, change.factors.rank)


def added(pairs: Mapping[str, Pair], name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Returns a weight with what an adapter adds to it: ``float32[out, in]``."""
    import torch

    if name not in pairs:
        return matrix
    down, up = (torch.from_numpy(each) for each in pairs[name])
    return matrix + (down @ up).T
