"""Finds a spec's tensors under the other names that checkpoints give them, as transformers does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Final

from edgeforge.families.assembly import EMBEDDING, HEAD
from edgeforge.families.spec import ModelSpec
from edgeforge.model.stored_experts import with_stacked_experts

_TEXT: Final = "language_model."
_OUTSIDE, _INSIDE = "language_model.model.", "model.language_model."


def named_as_stored(spec: ModelSpec, stored: Collection[str]) -> ModelSpec:
    """Returns the spec with the names that the checkpoint's tensors have.

    The text part of a model with images has a prefix in all its names, which newer files put after
    ``model.``. A model that was saved without its head's class has no prefix such as ``model.`` in
    its names. A tied model may store its one matrix as the head. Experts may be stacked.

    Args:
        spec: the spec, with the names of its family.
        stored: names of the checkpoint's tensors.
    """
    if any(name.startswith(_INSIDE) for name in stored):
        spec = _renamed(
            spec,
            {
                piece.tensor: piece.tensor.replace(_OUTSIDE, _INSIDE).removeprefix(_TEXT)
                for weight in spec.weights.values()
                for piece in weight.pieces
                if piece.tensor.startswith(_TEXT)
            },
        )
    (embedding,) = spec.weights[EMBEDDING].pieces
    prefix = embedding.tensor.split(".", 1)[0] + "."
    if not any(name.startswith(prefix) for name in stored):
        bare = {
            piece.tensor: piece.tensor.removeprefix(prefix)
            for weight in spec.weights.values()
            for piece in weight.pieces
        }
        # The parts of a quantized layer have its module's name, as its weight would have.
        modules = {name.rpartition(".")[0] for name in stored}
        if any(n != plain and plain.rpartition(".")[0] in modules for n, plain in bare.items()):
            spec = _renamed(spec, bare)
    spec = with_stacked_experts(spec, stored)
    (embedding,) = spec.weights[EMBEDDING].pieces
    if spec.tied and embedding.tensor not in stored and HEAD in stored:
        spec = _renamed(spec, {embedding.tensor: HEAD})
    return spec


def _renamed(spec: ModelSpec, names: dict[str, str]) -> ModelSpec:
    weights = {
        name: replace(
            weight,
            pieces=tuple(replace(p, tensor=names.get(p.tensor, p.tensor)) for p in weight.pieces),
        )
        for name, weight in spec.weights.items()
    }
    return replace(spec, weights=weights)
