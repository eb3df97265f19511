"""Frequencies and tables of the rotary embedding, computed in float64 and stored in float32."""

from __future__ import annotations

import math

import torch

from edgeforge.families.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, context: int) -> torch.Tensor:
    """Returns the angle per position of each rotated pair, ``float64[width // 2]`` in radians.

    Args:
        rope: the rotary embedding.
        context: the declared context in tokens. If it is over the original context, longrope uses
            its long factors at every position, so that a cache never mixes two sets of factors.

    >>> inverse_frequencies(RopeSpec(10000.0, 4), 16).tolist()
    [1.0, 0.01]
    """
    exponents = torch.arange(0, rope.width, 2, dtype=torch.float64) / rope.width
    plain = rope.theta**-exponents
    match rope.scaling:
        case "default":
            return plain
        case "linear":
            return plain / rope.factor
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope)
        case "longrope":
            chosen = rope.long_factor if uses_long_set(rope, context) else rope.short_factor
            return plain / torch.tensor(chosen, dtype=torch.float64)


def uses_long_set(rope: RopeSpec, context: int) -> bool:
    """Returns whether an artifact with this declared context uses longrope's long factors."""
    return rope.scaling == "longrope" and context > rope.original_context


def tables(rope: RopeSpec, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cosine and sine by position: two ``float32[context, width // 2]``."""
    frequencies = inverse_frequencies(rope, context)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * frequencies
    factor: torch.Tensor | float = rope.attention_factor
    if rope.growth:
        passed = torch.arange(context, dtype=torch.float64) // rope.original_context
        factor = factor * (1 + rope.growth * torch.log1p(passed))[:, None]
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _llama3(plain: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Applies Llama 3.1's rule: stretches long wavelengths, keeps short ones, ramps in between."""
    turns = rope.original_context * plain / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * (1 - kept) + plain * kept


def _yarn(plain: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Applies YaRN's rule: divides low frequencies, keeps high ones, ramps by pair in between."""

    def pair(turns: float) -> float:
        """The pair of columns, as a fraction, that turns so often in the original context."""
        wavelength = rope.original_context / (turns * 2 * math.pi)
        return rope.width * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    steps = torch.arange(len(plain), dtype=torch.float64)
    divided = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / rope.factor * divided + plain * (1 - divided)
