"""Builds the map from program weight names to checkpoint tensors that every family shares.

Program weights carry the names of the most fused layout there is (``qkv_proj``,
``gate_up_proj``), so that each runtime gets the fewest and largest matrix products; a family
says only of which checkpoint tensors each is stacked.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeforge.families.spec import LayerSpec, Piece, WeightSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
NORM_MATRIX = "model.norm_matrix.weight"
HEAD = "lm_head.weight"


def matrix(role: str, columns: int, *pieces: tuple[str, int]) -> WeightSpec:
    """A matrix stacked from ``(checkpoint tensor, rows)`` pairs of ``columns`` columns each.

    >>> matrix("linear", 8, ("q", 4), ("k", 2)).shape
    (6, 8)
    """
    stacked = tuple(Piece(name, (rows, columns)) for name, rows in pieces)
    rows = sum(piece.shape[0] for piece in stacked)
    assert role in ("embedding", "linear", "head")
    return WeightSpec((rows, columns), stacked, role)  # type: ignore[arg-type]


def norm(tensor: str, width: int) -> WeightSpec:
    """A norm's scale: one checkpoint tensor of ``width`` numbers."""
    return WeightSpec((width,), (Piece(tensor, (width,)),), "norm")


def assemble(
    *,
    hidden_size: int,
    vocab_size: int,
    layers: tuple[LayerSpec, ...],
    layer_weights: Callable[[int, LayerSpec], dict[str, WeightSpec]],
    embedding: str,
    final_norm: str,
    head: str | None,
) -> dict[str, WeightSpec]:
    """All weights of a decoder in the order the program uses them.

    Args:
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding and the head.
        layers: the dimensions of each layer.
        layer_weights: one layer's weights by their names within the layer.
        embedding: the embedding's checkpoint name.
        final_norm: the last norm's checkpoint name.
        head: the head's checkpoint name, None when it is tied to the embedding.
    """
    weights = {EMBEDDING: matrix("embedding", hidden_size, (embedding, vocab_size))}
    for index, layer in enumerate(layers):
        for name, weight in layer_weights(index, layer).items():
            weights[f"model.layers.{index}.{name}.weight"] = weight
    weights[FINAL_NORM] = norm(final_norm, hidden_size)
    if head is not None:
        weights[HEAD] = matrix("head", hidden_size, (head, vocab_size))
    return weights
