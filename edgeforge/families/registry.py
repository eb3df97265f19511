"""Every family EdgeForge reads, by ``model_type``. To add one: a file, an import, a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.checkpoint.imported.registry import FIELD, MLX_FIELD, read_method
from edgeforge.errors import CheckpointError
from edgeforge.families import (
    gemma,
    gemma2,
    gemma3,
    gemma3_text,
    granite,
    granitemoe,
    granitemoehybrid,
    jetmoe,
    lfm2,
    llama,
    minicpm,
    ministral3,
    mistral,
    mistral3,
    mixtral,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    openelm,
    phi,
    phi3,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    rwkv5,
    rwkv6,
    smollm3,
    stablelm,
)
from edgeforge.families.neutral_fields import check_causal, check_neutral_fields
from edgeforge.families.spec import ModelSpec
from quant.quoted import quoted
from quant.suggestion import did_you_mean

FAMILIES: dict[str, Callable[[ConfigReader, Mapping[str, object]], ModelSpec]] = {
    "gemma": gemma.read_spec,
    "gemma2": gemma2.read_spec,
    "gemma3": gemma3.read_spec,
    "gemma3_text": gemma3_text.read_spec,
    "granite": granite.read_spec,
    "granitemoe": granitemoe.read_spec,
    "granitemoehybrid": granitemoehybrid.read_spec,
    "jetmoe": jetmoe.read_spec,
    "lfm2": lfm2.read_spec,
    "llama": llama.read_spec,
    "minicpm": minicpm.read_spec,
    "ministral3": ministral3.read_spec,
    "mistral": mistral.read_spec,
    "mistral3": mistral3.read_spec,
    "mixtral": mixtral.read_spec,
    "olmo": olmo.read_spec,
    "olmo2": olmo2.read_spec,
    "olmo3": olmo3.read_spec,
    "olmoe": olmoe.read_spec,
    "openelm": openelm.read_spec,
    "phi": phi.read_spec,
    "phi3": phi3.read_spec,
    "phimoe": phimoe.read_spec,
    "qwen2": qwen2.read_spec,
    "qwen2_moe": qwen2_moe.read_spec,
    "qwen3": qwen3.read_spec,
    "qwen3_5": qwen3_5.read_spec,
    "qwen3_5_text": qwen3_5.read_text_spec,
    "qwen3_moe": qwen3_moe.read_spec,
    "rwkv5": rwkv5.read_spec,
    "rwkv6": rwkv6.read_spec,
    "smollm3": smollm3.read_spec,
    "stablelm": stablelm.read_spec,
}

# Released types whose names are one letter away from a family's: they are not misspelt.
_OTHER_TYPES = ("gemma3n", "llava", "mllama", "molmo2", "pixtral")


def read_spec(
    config: Mapping[str, object],
    generation: Mapping[str, object] | None = None,
    ignore: Iterable[str] = (),
) -> ModelSpec:
    """Returns the `ModelSpec` of a parsed ``config.json``.

    Args:
        config: the parsed ``config.json``.
        generation: ``generation_config.json``, if there is one.
        ignore: fields that the user knows not to change the maths.

    Raises:
        CheckpointError: the family is unknown, a field is missing or wrong, a field would change
            the maths and is not implemented, or the checkpoint is quantized by a method that
            EdgeForge does not import.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"config.json has the model_type {quoted(kind)}; EdgeForge reads "
            f"{', '.join(FAMILIES)}{_hint(str(kind))}; encoders and other modules go through "
            f"edgeforge export-module"
        )
    read_method(config, ignore)
    reader = ConfigReader(config, ignore)
    reader.get(FIELD)
    reader.get(MLX_FIELD)
    check_causal(reader)
    spec = FAMILIES[kind](reader, generation or {})
    check_neutral_fields(reader, spec)
    reader.finish()
    return spec


def _hint(kind: str) -> str:
    """Returns a remark that names the family that ``kind`` misspells; empty when there is none."""
    if kind.lower() in _OTHER_TYPES or set(kind) & set("_-"):  # a variant's name, as phi3_v is
        return ""

    def number(name: str) -> str:
        return "".join(filter(str.isdigit, name))

    # A number is part of a type's name, and another number another type.
    return did_you_mean(kind, [name for name in FAMILIES if number(name) == number(kind)])
