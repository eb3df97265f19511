"""Builds the map from program weight names to checkpoint tensors that every family shares.

Program weights are fused (``qk_proj``, ``gate_up_proj``), so that each runtime gets few and large
matrix products. The values' projection, ``v_proj``, stands apart: it has few rows, and rounding it
costs more than rounding any other matrix, so that recipes give it a format of its own. A family
only lists the checkpoint tensors from which each program weight is stacked.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeforge.families.spec import LayerSpec, Piece, WeightSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
NORM_MATRIX = "model.norm_matrix.weight"
HEAD = "lm_head.weight"


def matrix(role: str, columns: int, *pieces: tuple[str, int]) -> WeightSpec:
    """Returns a matrix of ``columns`` columns, stacked from ``(checkpoint tensor, rows)`` pairs.

    >>> matrix("linear", 8, ("q", 4), ("k", 2)).shape
    (6, 8)
    """
    stacked = tuple(Piece(name, (rows, columns)) for name, rows in pieces)
    rows = sum(piece.shape[0] for piece in stacked)
    assert role in ("embedding", "linear", "head")
    return WeightSpec((rows, columns), stacked, role)  # type: ignore[arg-type]


def packed_qkv(tensor: str, columns: int, q: int, kv: int) -> tuple[WeightSpec, WeightSpec]:
    """Returns ``qk_proj`` and ``v_proj`` of a checkpoint that stacks q, k and v in one tensor.

    Args:
        tensor: the checkpoint's tensor, ``[q + 2 * kv, columns]``.
        columns: width of the inputs.
        q: rows of all query heads.
        kv: rows of all key heads, and as many of all value heads.

    >>> qk, v = packed_qkv("qkv", 8, 4, 2)
    >>> qk.shape, v.shape, v.pieces[0].first
    ((6, 8), (2, 8), 6)
    """
    rows = q + 2 * kv
    qk = Piece(tensor, (q + kv, columns), 0, rows)
    v = Piece(tensor, (kv, columns), q + kv, rows)
    return WeightSpec(qk.shape, (qk,), "linear"), WeightSpec(v.shape, (v,), "linear")


def norm(tensor: str, width: int) -> WeightSpec:
    """Returns a norm's scale, which is one checkpoint tensor of ``width`` numbers."""
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
    """Returns all weights of a decoder by program name, in the order the program uses them.

    Args:
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding and the head.
        layers: the dimensions of each layer.
        layer_weights: returns one layer's weights by their names within the layer.
        embedding: the checkpoint's name of the embedding.
        final_norm: the checkpoint's name of the last norm.
        head: the checkpoint's name of the head, None when it is tied to the embedding.
    """
    weights = {EMBEDDING: matrix("embedding", hidden_size, (embedding, vocab_size))}
    for index, layer in enumerate(layers):
        for name, weight in layer_weights(index, layer).items():
            weights[f"model.layers.{index}.{name}.weight"] = weight
    weights[FINAL_NORM] = norm(final_norm, hidden_size)
    if head is not None:
        weights[HEAD] = matrix("head", hidden_size, (head, vocab_size))
    return weights
