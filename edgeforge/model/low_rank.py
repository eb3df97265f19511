"""What an adapter adds to the weights of a program, as two thin matrices for each.

A program's weight may stack several of the checkpoint's: its factors then lie beside each other,
``A = [A_q, A_k]`` and ``B = diag(B_q, B_k)``, so that one pair serves the stacked product.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgeforge.checkpoint.adapter import Adapter, read_floats
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.families.spec import ModelSpec, Piece, WeightSpec
from edgeforge.model.adaptation import Adaptation, Change, adapt, changes_of, untied
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

    @property
    def numbers(self) -> int:
        """How many numbers its factors have."""
        return sum(factor.size for pair in self.pairs.values() for factor in pair)


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
    refuse_names(adapters, targets, options)
    return [SeparateAdapter(adapter, low_rank(model, adapter)) for adapter in adapters]


def refuse_names(
    adapters: Sequence[Adapter], targets: Iterable[str], options: Mapping[str, object]
) -> None:
    """Refuses adapters by their names, and targets and options with which none lies beside weights.

    Raises:
        ExportError: a target's files hold no adapters.
        UsageError: two adapters have one name.
    """
    names, known = [adapter.name for adapter in adapters], tuple(targets)
    for name in names:
        for target in known:
            check_separate(target, name, options)
        if names.count(name) > 1:
            raise UsageError(
                f"two adapters are named {name}, and each is switched on by its name: rename the "
                f"folder of one"
            )


def refuse_rounded(weights: Iterable[str], recipe: str, activations: Mapping[str, str]) -> None:
    """Refuses adapters of products whose activations the recipe rounds.

    Args:
        weights: the weights that the adapters change.
        recipe: the recipe's name.
        activations: how activations are rounded, by the weight's name.

    Raises:
        UsageError: names a weight.
    """
    for name in weights:
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
    return _adaptable(model.spec)


def _adaptable(spec: ModelSpec) -> list[str]:
    return [
        name
        for name, weight in spec.weights.items()
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
    _refuse_more_than_factors(adapter)
    spec, found = adapt([adapter], model.checkpoint, model.spec, plain=True)
    changed = _changed(adapter, found, spec, model.spec)
    return {name: _stacked(weight, found, adapter) for name, weight in changed.items()}


def factor_numbers(spec: ModelSpec, adapter: Adapter) -> dict[str, int]:
    """Returns how many numbers the factors of each weight have; see `low_rank`. None is read.

    Args:
        spec: the base's dimensions.
        adapter: the adapter.

    Raises:
        CheckpointError: the adapter is of another model, or changes what no pair of factors can.
    """
    _refuse_more_than_factors(adapter)
    apart = untied(spec) if spec.tied else spec
    found = changes_of([adapter], apart)
    counts = {}
    for name, weight in _changed(adapter, found, apart, spec).items():
        ranks = {p.tensor: change.factors.rank for p, change in _changes(weight, found)}
        counts[name] = sum(ranks.values()) * sum(weight.shape)
    return counts


def _refuse_more_than_factors(adapter: Adapter) -> None:
    """Refuses an adapter that changes weights by more than two factors each.

    Raises:
        CheckpointError: names what it changes.
    """
    if adapter.replaced:
        raise _merge_only(adapter, f"{next(iter(adapter.replaced))} as a whole")
    for module, factors in adapter.factors.items():
        if factors.magnitude is not None:
            raise _merge_only(adapter, f"{module} by DoRA")


def _merge_only(adapter: Adapter, what: str) -> CheckpointError:
    return CheckpointError(
        f"the adapter {adapter.source} changes {what}, which cannot lie beside the weights: leave "
        f"--adapter-mode out to merge it"
    )


def _changed(
    adapter: Adapter, found: Adaptation, spec: ModelSpec, base: ModelSpec
) -> dict[str, WeightSpec]:
    """Returns the weights that an adapter changes, by name.

    Args:
        adapter: the adapter.
        found: what it changes.
        spec: the spec in which the changed tensors are; its head may be a matrix of its own where
            the base's is tied.
        base: the base's spec.

    Raises:
        CheckpointError: a weight takes no adapter beside it.
    """
    allowed, weights = set(_adaptable(base)), {}
    for name, weight in spec.weights.items():
        changed = [piece.tensor for piece, _ in _changes(weight, found)]
        if not changed:
            continue
        if _EXPERTS.search(name):
            raise _merge_only(adapter, f"{changed[0]}, of a mixture's experts")
        if weight.role == "router":
            raise _merge_only(adapter, f"{changed[0]}, of a mixture's router")
        if name not in allowed:
            raise _merge_only(adapter, f"{changed[0]}, the embedding or the head")
        weights[name] = weight
    return weights


def _changes(weight: WeightSpec, found: Adaptation) -> Iterator[tuple[Piece, Change]]:
    """Yields the pieces of a weight that change, each with what is added to it."""
    for piece in weight.pieces:
        for change in found.changes.get(piece.tensor, ()):
            yield piece, change


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
