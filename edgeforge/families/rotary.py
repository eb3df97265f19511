"""Reads either spelling of a rotary embedding's configuration into a `RopeSpec`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.layer_kinds import FULL, SLIDING
from edgeforge.families.spec import RopeSpec
from quant.quoted import quoted

_ORIGINAL: Final = "original_max_position_embeddings"


def read_rope(
    config: ConfigReader,
    head_dim: int,
    max_context: int,
    *,
    theta: float = 10000.0,
    share: float = 1.0,
    original_context: int = 0,
    partial: bool = False,
    growing: bool = False,
    magnitudes: bool = False,
    harmless: Collection[str] = (),
) -> RopeSpec:
    """Reads ``rope_theta`` + ``rope_scaling`` (old files) or ``rope_parameters`` (newer ones).

    Args:
        config: the reader of the whole ``config.json``.
        head_dim: width of one head.
        max_context: ``max_position_embeddings``, tokens.
        theta: the base frequency where the file has none.
        share: the share of rotated columns where the file has none.
        original_context: longrope's original context where the file has none beside the section,
            tokens; 0 for the section's, or ``max_context``.
        partial: whether the family may rotate only the first columns of each head.
        growing: whether the family's queries may grow with the position.
        magnitudes: whether the family's sections state the multiplier of cosine and sine.
        harmless: fields of the family's sections that change nothing for a text.

    Raises:
        CheckpointError: the type of scaling is not implemented, its values are wrong, or both
            spellings are in the file and contradict each other.
    """
    theta = config.real("rope_theta", theta)
    outer = config.get("partial_rotary_factor", share)
    sections = (config.section("rope_parameters"), config.section("rope_scaling"))
    ropes = [
        _read_section(
            config,
            section,
            theta,
            outer,
            head_dim,
            max_context,
            original_context,
            growing,
            magnitudes,
            harmless,
        )
        for section in sections
        if section is not None and section.fields()
    ] or [RopeSpec(theta, rotated_columns(head_dim, outer))]
    rope = ropes[0]
    if any(other != rope for other in ropes):
        raise CheckpointError(
            f"{config.where}: rope_parameters and rope_scaling contradict each other; keep one"
        )
    if rope.width != head_dim and not partial:
        raise CheckpointError(
            f"{config.where}: partial_rotary_factor rotates {rope.width} of {head_dim} columns of "
            f"a head; this family rotates all of them"
        )
    return rope


def read_ropes_by_kind(
    config: ConfigReader,
    head_dim: int,
    max_context: int,
    *,
    theta: float,
    sliding_theta: float,
) -> tuple[RopeSpec, RopeSpec]:
    """Reads the rotary embeddings of layers that see the whole context, and of sliding layers.

    Newer files have a section for each in ``rope_parameters``. In older ones ``rope_theta`` and
    ``rope_scaling`` speak of the first alone.

    Args:
        config: the reader of the whole ``config.json``.
        head_dim: width of one head.
        max_context: ``max_position_embeddings``, tokens.
        theta: the base frequency of the first where the file has none.
        sliding_theta: that of the second where neither ``rope_parameters`` nor the field
            ``rope_local_base_freq`` has one.

    Raises:
        CheckpointError: as `read_rope`.
    """
    theta = config.real("rope_theta", theta)
    sliding_theta = config.real("rope_local_base_freq", sliding_theta)
    both, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    full = None if both is None else both.section(FULL)
    sliding = None if both is None else both.section(SLIDING)
    if both is not None:
        both.finish()
    if full is not None and scaling is not None and scaling.fields():
        raise CheckpointError(
            f"{config.where}: rope_parameters and rope_scaling contradict each other; keep one"
        )

    def read(section: ConfigReader | None, theta: float) -> RopeSpec:
        if section is None or not section.fields():
            return RopeSpec(theta, rotated_columns(head_dim))
        return _read_section(config, section, theta, 1.0, head_dim, max_context, 0)

    return read(full or scaling, theta), read(sliding, sliding_theta)


def _read_section(
    config: ConfigReader,
    section: ConfigReader,
    theta: float,
    outer: object,
    head_dim: int,
    max_context: int,
    original_context: int,
    growing: bool = False,
    magnitudes: bool = False,
    harmless: Collection[str] = (),
) -> RopeSpec:
    for field in harmless:
        section.get(field)
    if "rope_type" in section.fields() or "type" not in section.fields():
        kind = section.get("rope_type", "default")
        section.get("type")
    else:
        kind = section.get("type")
    theta = section.real("rope_theta", theta)
    width = rotated_columns(head_dim, section.get("partial_rotary_factor", outer))
    rope = _read_scaling(config, section, str(kind), theta, width, max_context, original_context)
    if growing and section.get("llama_4_scaling_beta") is not None:
        section.get("max_position_embeddings")  # repeats the field outside, and no code reads it
        original = section.integer(_ORIGINAL)
        rope = replace(rope, original_context=original, growth=section.real("llama_4_scaling_beta"))
    if magnitudes and rope.scaling != "default":
        rope = replace(rope, attention_factor=_read_magnitude(section))
    section.finish()
    return rope


def _read_scaling(
    config: ConfigReader,
    section: ConfigReader,
    kind: str,
    theta: float,
    width: int,
    max_context: int,
    original_context: int,
) -> RopeSpec:
    match kind:
        case "default":
            section.require("factor", 1)
            return RopeSpec(theta, width)
        case "linear":
            return RopeSpec(theta, width, "linear", factor=section.real("factor"))
        case "llama3":
            low, high = section.real("low_freq_factor"), section.real("high_freq_factor")
            if low >= high:
                raise CheckpointError(
                    f"{section.where}: low_freq_factor {low} is not under high_freq_factor {high}"
                )
            return RopeSpec(
                theta,
                width,
                "llama3",
                factor=section.real("factor"),
                low_freq_factor=low,
                high_freq_factor=high,
                original_context=section.integer("original_max_position_embeddings"),
            )
        case "longrope" | "su":
            original = _read_original(config, section, max_context, original_context)
            field = _ORIGINAL
            if original < 2:
                raise CheckpointError(
                    f"{config.where}: {field} is {original}; it must be at least 2"
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
        case "yarn":
            return _read_yarn(section, theta, width, max_context)
    raise CheckpointError(
        f"{section.where} has the type {quoted(kind)}; EdgeForge implements default, linear, "
        f"llama3, yarn and longrope (also spelled su)"
    )


def _read_yarn(section: ConfigReader, theta: float, width: int, max_context: int) -> RopeSpec:
    """Reads YaRN (Peng et al. 2023, arXiv 2309.00071), with DeepSeek's pair of mscales."""
    original = section.integer(_ORIGINAL, max_context)
    stretch = None if section.get(_ORIGINAL) is None else max_context / original
    factor = section.real("factor", stretch)

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    fields = ("mscale", "mscale_all_dim")  # 0 and null are none
    scales = [section.real(field) for field in fields if section.get(field)]
    attention = magnitude(1.0)
    if len(scales) == 2:
        attention = magnitude(scales[0]) / magnitude(scales[1])
    return RopeSpec(
        theta,
        width,
        "yarn",
        factor=factor,
        original_context=original,
        attention_factor=section.real("attention_factor", attention),
        beta_fast=section.real("beta_fast", 32.0),
        beta_slow=section.real("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
    )


def _read_original(
    config: ConfigReader, section: ConfigReader, max_context: int, original_context: int
) -> int:
    """Returns longrope's original context in tokens, of the places where it may stand.

    A family with a default of its own has the field beside the section, and transformers never
    reads the one in the section then.

    Raises:
        CheckpointError: both places have a number, and they differ.
    """
    inner = section.integer(_ORIGINAL, max_context)
    if config.get(_ORIGINAL) is None:
        return original_context or inner
    outer = config.integer(_ORIGINAL)
    if section.get(_ORIGINAL) is not None and inner != outer:
        raise CheckpointError(
            f"{config.where}: {_ORIGINAL} is {outer}, but {inner} in {section.where}"
        )
    return outer


def _read_magnitude(section: ConfigReader) -> float:
    """Returns the multiplier of cosine and sine, which Phi-3.5-MoE's files state twice.

    Raises:
        CheckpointError: texts within the original context and longer ones have different ones.
    """
    short, long = section.real("short_mscale"), section.real("long_mscale")
    if short != long:
        raise CheckpointError(
            f"{section.where}: short_mscale {short} and long_mscale {long} differ; EdgeForge "
            f"implements one for all texts"
        )
    return long


def _factors(section: ConfigReader, field: str, width: int) -> tuple[float, ...]:
    factors = section.reals(field)
    if factors is None or len(factors) != width // 2:
        found = "none" if factors is None else str(len(factors))
        raise CheckpointError(
            f"{section.where}: {field} must list {width // 2} numbers, one per frequency; "
            f"found {found}"
        )
    return factors


def scaled_context(rope: RopeSpec, max_context: int) -> int:
    """Returns the longest context of a model, tokens.

    Linear scaling stretches the positions that the file states by its factor, and YaRN those that
    its section states; the other rules are written into files that state the stretched context.

    >>> scaled_context(RopeSpec(10000.0, 64, "linear", factor=4.0), 4096)
    16384
    """
    if rope.scaling == "yarn":
        return max(max_context, int(rope.original_context * rope.factor))
    stretch = rope.factor if rope.scaling == "linear" else 1.0
    return max(max_context, int(max_context * stretch))


def rotated_columns(head_dim: int, factor: object = 1.0) -> int:
    """Returns how many columns of a head a partial rotary embedding rotates.

    Args:
        head_dim: width of one head.
        factor: ``partial_rotary_factor``, the share of rotated columns.

    >>> rotated_columns(128, 0.75)
    96

    Raises:
        CheckpointError: the factor is outside (0, 1], or the columns do not pair up.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise CheckpointError(f"partial_rotary_factor is {quoted(factor)}; it must be in (0, 1]")
    width = int(head_dim * factor)
    if width % 2 or not width:
        raise CheckpointError(
            f"head_dim {head_dim} and partial_rotary_factor {quoted(factor)} give {width} rotated "
            f"columns; the number must be even and above zero, because columns are rotated in pairs"
        )
    return width
