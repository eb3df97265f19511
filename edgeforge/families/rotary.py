"""The two spellings of a rotary embedding's configuration, read into one `RopeSpec`."""

from __future__ import annotations

import math

from edgeforge.errors import CheckpointError
from edgeforge.families.config import ConfigReader
from edgeforge.spec import RopeSpec


def read_rope(config: ConfigReader, head_dim: int, max_context: int) -> RopeSpec:
    """Reads ``rope_theta`` + ``rope_scaling`` (old files) or ``rope_parameters`` (newer ones).

    Args:
        config: the reader of the whole configuration.
        head_dim: width of one head.
        max_context: ``max_position_embeddings``.

    Raises:
        CheckpointError: a kind of scaling that is not implemented, or values that contradict it.
    """
    theta = config.real("rope_theta", 10000.0)
    outer = config.get("partial_rotary_factor", 1.0)
    section = config.section("rope_parameters")
    scaling = config.section("rope_scaling")
    if section is None:
        section = scaling
    if section is None:
        return RopeSpec(theta, _width(head_dim, outer))
    if "rope_type" in section.fields() or "type" not in section.fields():
        kind = section.get("rope_type", "default")
        section.get("type")
    else:
        kind = section.get("type")
    theta = section.real("rope_theta", theta)
    width = _width(head_dim, section.get("partial_rotary_factor", outer))
    rope = _read_scaling(config, section, str(kind), theta, width, max_context)
    section.finish()
    return rope


def _read_scaling(
    config: ConfigReader,
    section: ConfigReader,
    kind: str,
    theta: float,
    width: int,
    max_context: int,
) -> RopeSpec:
    match kind:
        case "default":
            return RopeSpec(theta, width)
        case "linear":
            return RopeSpec(theta, width, "linear", factor=section.real("factor"))
        case "llama3":
            return RopeSpec(
                theta,
                width,
                "llama3",
                factor=section.real("factor"),
                low_freq_factor=section.real("low_freq_factor"),
                high_freq_factor=section.real("high_freq_factor"),
                original_context=section.integer("original_max_position_embeddings"),
            )
        case "longrope" | "su":
            outer = config.get("original_max_position_embeddings")
            original = section.integer(
                "original_max_position_embeddings", outer if isinstance(outer, int) else max_context
            )
            stretch = section.real("factor", max_context / original)
            attention = 1.0
            if stretch > 1:
                attention = math.sqrt(1 + math.log(stretch) / math.log(original))
            return RopeSpec(
                theta,
                width,
                "longrope",
                original_context=original,
                short_factor=_factors(section, "short_factor", width),
                long_factor=_factors(section, "long_factor", width),
                attention_factor=section.real("attention_factor", attention),
            )
    raise CheckpointError(
        f"{section.where} has the type {kind!r}; EdgeForge implements default, linear, llama3 and "
        f"longrope (also spelled su)"
    )


def _factors(section: ConfigReader, field: str, width: int) -> tuple[float, ...]:
    factors = section.reals(field)
    if factors is None or len(factors) != width // 2:
        found = "none" if factors is None else str(len(factors))
        raise CheckpointError(
            f"{section.where}: {field} must list {width // 2} numbers, one a frequency; "
            f"found {found}"
        )
    return factors


def _width(head_dim: int, factor: object) -> int:
    if not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise CheckpointError(f"partial_rotary_factor is {factor!r}; it must be in (0, 1]")
    width = int(head_dim * factor)
    if width % 2:
        raise CheckpointError(f"{width} rotated columns of a head of {head_dim} are not even")
    return width
