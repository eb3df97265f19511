"""Builds the map from program weight names to checkpoint tensors that every family shares.

Program weights are fused (``qk_proj``, ``gate_up_proj``), so that each runtime gets few and large
matrix products. The values' projection, ``v_proj``, stands apart: it has few rows, and rounding it
costs more than rounding any other matrix, so that recipes give it a format of its own. A family
only lists the checkpoint tensors from which each program weight is stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from edgeforge.families.spec import LayerSpec, Piece, WeightSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
NORM_MATRIX = "model.norm_matrix.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"


def matrix(
    role: Literal["embedding", "linear", "head", "router", "gate"],
    columns: int,
    *pieces: tuple[str, int],
) -> WeightSpec:
    """Returns a matrix of ``columns`` columns, stacked from ``(checkpoint tensor, rows)`` pairs.

    >>> matrix("linear", 8, ("q", 4), ("k", 2)).shape
    (6, 8)
    """
    stacked = tuple(Piece(name, (rows, columns)) for name, rows in pieces)
    rows = sum(piece.shape[0] for piece in stacked)
    return WeightSpec((rows, columns), stacked, role)


def bias(*pieces: tuple[str, int]) -> WeightSpec:
    """Returns a bias, stacked from ``(checkpoint tensor, numbers)`` pairs like its matrix.

    >>> bias(("q.bias", 4), ("k.bias", 2)).shape
    (6,)
    """
    stacked = tuple(Piece(name, (count,)) for name, count in pieces)
    return WeightSpec((sum(piece.shape[0] for piece in stacked),), stacked, "bias")


def convolution(tensor: str, columns: int, width: int) -> WeightSpec:
    """Returns the weight of a convolution of each column: a tensor ``[columns, 1, width]``."""
    return WeightSpec((columns, width), (Piece(tensor, (columns, 1, width)),), "conv")


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


def norm(tensor: str, width: int, *, added: float = 0.0) -> WeightSpec:
    """Returns a norm's scale, which is one checkpoint tensor of ``width`` numbers.

    Args:
        tensor: the tensor's name.
        width: how many numbers it has.
        added: what is added to each of them: 1 for norms that multiply by one plus their weight.
    """
    return WeightSpec((width,), (Piece(tensor, (width,)),), "norm", added)


def assemble(
    *,
    hidden_size: int,
    vocab_size: int,
    layers: tuple[LayerSpec, ...],
    layer_weights: Callable[[int, LayerSpec], dict[str, WeightSpec]],
    embedding: str,
    final_norm: Mapping[str, WeightSpec],
    head: str | None,
    head_bias: str | None = None,
) -> dict[str, WeightSpec]:
    """Returns all weights of a decoder by program name, in the order the program uses them.

    Args:
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding and the head.
        layers: the dimensions of each layer.
        layer_weights: returns one layer's weights by their names within the layer, a matrix or a
            norm's scale without ``.weight`` at the end, a bias with ``.bias``.
        embedding: the checkpoint's name of the embedding.
        final_norm: the last norm's weights, by ``weight`` and ``bias``; empty where it has none.
        head: the checkpoint's name of the head, None when it is tied to the embedding.
        head_bias: the checkpoint's name of the head's bias, None where it has none.
    """
    weights = {EMBEDDING: matrix("embedding", hidden_size, (embedding, vocab_size))}
    for index, layer in enumerate(layers):
        for name, weight in layer_weights(index, layer).items():
            part = name if name.endswith(".bias") else f"{name}.weight"
            weights[f"model.layers.{index}.{part}"] = weight
    for part, weight in final_norm.items():
        weights[f"{FINAL_NORM.removesuffix('weight')}{part}"] = weight
    if head is not None:
        weights[HEAD] = matrix("head", hidden_size, (head, vocab_size))
    if head_bias is not None:
        weights[HEAD_BIAS] = bias((head_bias, vocab_size))
    return weights
