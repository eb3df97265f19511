"""The names of a package's functions, inputs, outputs and states, and of its files."""

from __future__ import annotations

import re
from typing import Final

from exporters.errors import ExportError

PACKAGE: Final = "model.mlpackage"
MODEL_PATH: Final = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_PATH: Final = "Data/com.apple.CoreML/weights/weight.bin"
# How the model's specification refers to its weight file.
WEIGHTS_REFERENCE: Final = "@model_path/weights/weight.bin"

# The default function: takes one token.
DECODE: Final = "decode"
# Takes as many tokens as it was written for and gives the logits of the last.
PREFILL: Final = "prefill"
# Takes a token and the draft behind it, as many tokens as it was written for, and gives the logits
# of all.
DRAFT: Final = "draft"
# Takes as many tokens as it was written for and gives the logits of all.
VERIFY: Final = "verify"
# The only function of a package for iOS 17: takes one token or a chunk and gives the logits of the
# last.
MAIN: Final = "main"

FUNCTIONS: Final = (DECODE, PREFILL, DRAFT, VERIFY)
"""The functions of a package for iOS 18; `MAIN` is the only one of a package for iOS 17."""

TOKENS: Final = "inputIds"  # int32[1, t]
POSITION: Final = "position"  # int32[1]: tokens already cached
LOGITS: Final = "logits"  # fp16[1, 1 or t, vocabulary]

# How the name of a short convolution's weight ends, whose few columns are float in every recipe.
CONVOLUTION: Final = ".conv.conv.weight"
# How the names of a recurrence's weights end that hold numbers of each head or of its rows.
GAINS: Final = (".decay.weight", ".bonus.weight", ".skip.weight")
# How the names of the matrices end that make decays, steps and mixes of each token.
_GATES: Final = tuple(
    f".{name}.weight"
    for name in (
        *("dt_proj", "beta_proj", "decay_down", "decay_up", "mix_down"),
        *(f"mix_up_{part}" for part in ("decay", "key", "value", "receptance", "gate")),
    )
)
# How the names of all weights end that are float32 in every recipe, besides vectors.
FLOAT: Final = (
    *(CONVOLUTION, ".mamba.conv.weight", ".linear_attn.conv.weight"),
    *(".mlp.router.weight", ".mlp.shared_expert_gate.weight", ".self_attn.router.weight"),
    *GAINS,
    *_GATES,
)

# The states by the end of their names in the program; a memory becomes two.
_STATES: Final = {
    "k_cache": ("keyCache",),
    "v_cache": ("valueCache",),
    "conv.recent": ("convState",),
    "mamba.recent": ("convState",),
    "linear_attn.recent": ("convState",),
    "time_mix.recent": ("shiftState",),
    "mlp.recent": ("channelShiftState",),
    "memory": ("memoryHigh", "memoryLow"),
}
# Suffix of the output that gives a state back after the call, where there are no states.
UPDATED: Final = "Updated"

# How the names of weights end, in the program and in the package.
_ENDS: Final = ("weight", "bias")

# Suffixes of the constants that hold an adapter's factors of a weight.
LORA_A: Final = "__lora_A"
LORA_B: Final = "__lora_B"

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.]+")


def state_names(name: str) -> tuple[str, ...]:
    """The names of the states (for iOS 17: the inputs) that a program's state becomes.

    >>> state_names("model.layers.3.self_attn.k_cache"), state_names("model.layers.0.conv.recent")
    (('keyCache_3',), ('convState_0',))
    >>> state_names("model.layers.3.time_mix.memory")
    ('memoryHigh_3', 'memoryLow_3')
    """
    _, _, layer, *parts = name.split(".")
    found = next(made for end, made in _STATES.items() if ".".join(parts).endswith(end))
    return tuple(f"{each}_{layer}" for each in found)


def identifier(weight: str) -> str:
    """Turns a weight's name into an identifier that MIL accepts; `weight_name` undoes it.

    >>> identifier("model.layers.0.self_attn.qkv_proj.weight")
    'model__layers__0__self_attn__qkv_proj__weight'

    Raises:
        ExportError: `weight_name` could not restore this name.
    """
    if not _PLAIN.fullmatch(weight) or "__" in weight:
        raise ExportError(
            f"{weight!r} cannot name a weight in a Core ML package: use only letters, digits, dots "
            f"and single underscores"
        )
    return weight.replace(".", "__")


def weight_name(identifier: str) -> str:
    """Undoes `identifier`.

    >>> weight_name("lm_head__weight")
    'lm_head.weight'
    """
    return identifier.replace("__", ".")


def is_weight(identifier: str) -> bool:
    """Whether an identifier is a weight's.

    >>> is_weight("model__norm__weight"), is_weight("no_bias_fp16_64")
    (True, False)
    """
    return identifier.endswith(tuple(f"__{end}" for end in _ENDS))


def factor_name(weight: str, suffix: str) -> str:
    """The name of the constant that holds an adapter's factor of a weight.

    >>> factor_name("model.layers.0.mlp.down_proj.weight", LORA_A)
    'model__layers__0__mlp__down_proj__lora_A'
    """
    return identifier(weight).removesuffix("__weight") + suffix
