"""RWKV 6 (Finch, arXiv 2404.05892): thin matrices make mixes and decays of each token."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.rwkv import mix, read_rwkv
from edgeforge.families.spec import ModelSpec, Piece, RecurrenceSpec, WeightSpec

_MIXES = (("decay", "w"), ("key", "k"), ("value", "v"), ("receptance", "r"), ("gate", "g"))
"""What is mixed, and its letter in tensors' names, in the order of the stacked tensors."""


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an RWKV 6 configuration (the fields of the releases' ``configuration_rwkv6.py``)."""
    return read_rwkv(
        config,
        generation,
        model_type="rwkv6",
        versions=("6_0", "6.0"),
        dynamic=True,
        mixes=_mixes,
        channel_mixes=(("mix_key", "time_maa_k"), ("mix_receptance", "time_maa_r")),
        form="plain",
    )


def _mixes(at: str, hidden: int, made: RecurrenceSpec) -> dict[str, WeightSpec]:
    # No field says these two; the releases' code has them by the width.
    rank, decay_rank = (64, 128) if hidden == 4096 else (32, 64)
    weights = {f"mix_{name}": mix(f"{at}time_maa_{key}", hidden, "plain") for name, key in _MIXES}
    weights["mix_all"] = mix(f"{at}time_maa_x", hidden, "plain")
    weights["mix_down"] = _turned(f"{at}time_maa_w1", len(_MIXES) * rank, hidden)
    for index, (name, _) in enumerate(_MIXES):
        piece = Piece(
            f"{at}time_maa_w2", (rank, hidden), index * rank, len(_MIXES) * rank, len(_MIXES)
        )
        up = WeightSpec((hidden, rank), (piece,), "gate", transposed=True)
        weights[f"mix_up_{name}"] = up
    weights["decay_down"] = _turned(f"{at}time_decay_w1", decay_rank, hidden)
    weights["decay_up"] = _turned(f"{at}time_decay_w2", hidden, decay_rank)
    decay = Piece(f"{at}time_decay", (1, 1, hidden))
    weights["decay_up.bias"] = WeightSpec((hidden,), (decay,), "bias")
    return weights


def _turned(tensor: str, rows: int, columns: int) -> WeightSpec:
    """Returns a matrix ``(rows, columns)`` whose tensor has its rows and columns exchanged."""
    return WeightSpec((rows, columns), (Piece(tensor, (columns, rows)),), "gate", transposed=True)
