"""`LoraConfig`: what an adapter's ``adapter_config.json`` says about its maths.

The file is that of peft. Every field is known here: one that would change the maths and is not
computed is refused by its name, and so is one that nobody here has heard of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from edgeforge.checkpoint.adapters import ADAPTER_CONFIG
from edgeforge.checkpoint.json_text import MAX_CONFIG_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

# Fields that say how an adapter was trained, saved or named: none changes what it computes.
_HARMLESS: Final = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
    )
)
# Ways to begin a training that leave the base as it is; all others change the base itself.
_PLAIN_STARTS: Final = ("gaussian", "eva", "orthogonal", "mica")
_LARGEST_RANK: Final = 1 << 16

_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter's configuration says.

    Attributes:
        base: the model that it was trained for, as its training named it; empty where it does not
            say.
        rank: rank of the two factors, where no pattern says otherwise.
        alpha: numerator of their scale, where no pattern says otherwise.
        rank_pattern: ranks by regular expressions of modules' names.
        alpha_pattern: alphas in the same form.
        rslora: whether the scale is ``alpha / sqrt(rank)`` (rank-stabilized LoRA), not
            ``alpha / rank``.
        dora: whether each row of a changed matrix has a magnitude of its own (DoRA).
        target_modules: ends of the names of the modules that it changes; empty where it says so by
            a regular expression.
        whole: whether every layer's modules of those names are changed.
    """

    base: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    target_modules: tuple[str, ...] = ()
    whole: bool = True

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's factors; ``module`` is its name in transformers."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor on the product of a module's two factors."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def read_lora_config(folder: Path) -> LoraConfig:
    """Reads an adapter's configuration.

    Raises:
        CheckpointError: it is not LoRA, or has a field that EdgeForge does not compute.
    """
    path = folder / ADAPTER_CONFIG
    row = parse_object(read_small_file(path, MAX_CONFIG_BYTES), str(path), strict=False)
    kind = row.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} sets peft_type to {quoted(kind)}; EdgeForge reads LORA: merge the adapter "
            f"with peft, merge_and_unload().save_pretrained(MERGED), and export MERGED"
        )
    for name, value in row.items():
        if name not in _HARMLESS and value not in (None, False, [], {}):
            raise CheckpointError(
                f"{path} sets {name} to {quoted(value)}, which EdgeForge does not compute: merge "
                f"the adapter with peft, merge_and_unload().save_pretrained(MERGED), and export "
                f"MERGED"
            )
    _refuse_changed_base(path, row.get("init_lora_weights", True))
    bias = row.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path} sets bias to {quoted(bias)}: none, all or lora_only is read")
    targets = row.get("target_modules")
    narrowed = any(row.get(name) for name in ("exclude_modules", "layers_to_transform"))
    return LoraConfig(
        base=base if isinstance(base := row.get("base_model_name_or_path"), str) else "",
        rank=_rank(path, "r", row.get("r")),
        alpha=_number(path, "lora_alpha", row.get("lora_alpha")),
        rank_pattern={
            key: _rank(path, f"rank_pattern[{quoted(key)}]", value)
            for key, value in _patterns(path, "rank_pattern", row).items()
        },
        alpha_pattern={
            key: _number(path, f"alpha_pattern[{quoted(key)}]", value)
            for key, value in _patterns(path, "alpha_pattern", row).items()
        },
        rslora=_flag(path, "use_rslora", row),
        dora=_flag(path, "use_dora", row),
        target_modules=(
            tuple(name for name in targets if isinstance(name, str))
            if isinstance(targets, list)
            else ()
        ),
        whole=not narrowed,
    )


def _refuse_changed_base(path: Path, start: object) -> None:
    if isinstance(start, bool) or start in _PLAIN_STARTS:
        return
    raise CheckpointError(
        f"{path} sets init_lora_weights to {quoted(start)}: that training changed the base model "
        f"too, and the adapter fits only what it left of it: save it with peft, "
        f"save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL), which makes "
        f"plain LoRA of it"
    )


def _by_pattern(patterns: Mapping[str, _T], module: str, otherwise: _T) -> _T:
    """Returns the value of the first pattern that is the end of a module's name, as peft does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _patterns(path: Path, name: str, row: Mapping[str, object]) -> Mapping[str, object]:
    found = row.get(name) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} sets {name} to {quoted(found)}, which is not a table")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{path}: {name} has {quoted(pattern)}, which is no regular expression: {error}"
            ) from None
    return found


def _rank(path: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST_RANK:
        raise CheckpointError(
            f"{path} sets {name} to {quoted(value)}; a rank is a whole number of at least 1"
        )
    return value


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise CheckpointError(f"{path} sets {name} to {quoted(value)}, which is not a number")
    return float(value)


def _flag(path: Path, name: str, row: Mapping[str, object]) -> bool:
    value = row.get(name) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{path} sets {name} to {quoted(value)}, not true or false")
    return value
