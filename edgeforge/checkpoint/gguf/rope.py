"""The scaling of a GGUF file's rotary embedding, as a ``config.json`` states it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from edgeforge.checkpoint.gguf.architectures import Fields
from edgeforge.checkpoint.gguf.metadata import Metadata, shortest
from edgeforge.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FACTORS: Final = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TABLES: Final = (FACTORS, LONG, SHORT)
"""Tensors that hold one divisor for each frequency."""

# The values of Llama 3.1, 3.2 and 3.3: `low_freq_factor`, `high_freq_factor`, original context.
_LLAMA3: Final = (1.0, 4.0, 8192)
_TOLERANCE: Final = 1e-4


def rope_fields(
    data: Metadata,
    config: Fields,
    head_dim: int,
    rotated: int,
    tables: Mapping[str, NDArray[np.float32]],
) -> Fields:
    """Returns the fields that say how frequencies are scaled and how many columns are rotated.

    Args:
        data: the file's metadata.
        config: the configuration so far.
        head_dim: width of a head.
        rotated: how many of its columns are rotated.
        tables: the file's tensors of `TABLES`.

    Raises:
        CheckpointError: the file states a scaling that EdgeForge cannot state.
    """
    found: Fields = {}
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    for name, table in tables.items():
        if table.shape != (rotated // 2,):
            raise CheckpointError(
                f"{data.where}: {name} has shape {list(table.shape)}, and {rotated} columns of a "
                f"head are rotated: the file is damaged"
            )
    kind = data.get("rope.scaling.type")
    factor = data.real("rope.scaling.factor", 0.0) or data.real("rope.scale_linear", 0.0)
    stretch = data.get("rope.scaling.attn_factor")
    original = data.integer("rope.scaling.original_context_length", 0)
    if LONG in tables or SHORT in tables:
        if not (LONG in tables and SHORT in tables):
            raise CheckpointError(f"{data.where} has only one of {LONG} and {SHORT}: it is damaged")
        scaling: Fields = {
            "rope_type": "longrope",
            "long_factor": [shortest(float(each)) for each in tables[LONG]],
            "short_factor": [shortest(float(each)) for each in tables[SHORT]],
        }
        if stretch is not None:
            scaling["attention_factor"] = _attention_factor(data, config, original)
        return {**found, "rope_scaling": scaling}
    if FACTORS in tables:
        theta = float(str(config["rope_theta"]))
        return {**found, "rope_scaling": _of_factors(tables[FACTORS].tolist(), theta, rotated)}
    if kind in (None, "none") or (kind == "linear" and factor in (0, 1)):
        if kind is None and factor not in (0, 1):
            kind = "linear"  # as files of before the field say it
        else:
            return found
    scaling = {"rope_type": str(kind), "factor": factor}
    if kind != "linear":
        scaling["original_max_position_embeddings"] = original
    return {**found, "rope_scaling": scaling}


def _attention_factor(data: Metadata, config: Fields, original: int) -> float:
    """Returns longrope's multiplier: the exact one where the file's is that, rounded."""
    given = data.real("rope.scaling.attn_factor")
    context = int(str(config["max_position_embeddings"]))
    if original > 1 and context > original:
        exact = math.sqrt(1 + math.log(context / original) / math.log(original))
        if math.isclose(given, exact, rel_tol=_TOLERANCE):
            return exact
    return given


def _of_factors(factors: Sequence[float], theta: float, rotated: int) -> Fields:
    """Returns the scaling of a list of divisors: Llama 3's where they are its, else the list.

    The list is longrope's with both lists alike and no other multiplier.
    """
    low, high, original = _LLAMA3
    factor = shortest(max(factors))
    wanted = []
    for at in range(rotated // 2):
        wave = 2 * math.pi * theta ** (2 * at / rotated)
        smooth = (original / wave - low) / (high - low)
        if wave < original / high:
            wanted.append(1.0)
        elif wave > original / low:
            wanted.append(factor)
        else:
            wanted.append(1 / ((1 - smooth) / factor + smooth))
    pairs = zip(factors, wanted, strict=True)
    if factor > 1 and all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in pairs):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    listed = [shortest(each) for each in factors]
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "attention_factor": 1.0,
    }
