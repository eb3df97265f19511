"""RWKV 5 (Eagle, arXiv 2404.05892), version 5.2: all tokens have the same mixes and decays."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.rwkv import mix, numbers, read_rwkv
from edgeforge.families.spec import ModelSpec, RecurrenceSpec, WeightSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an RWKV 5 configuration (the fields of the releases' ``configuration_rwkv5.py``)."""
    return read_rwkv(
        config,
        generation,
        model_type="rwkv5",
        versions=("5_2", "5.2"),
        dynamic=False,
        mixes=_mixes,
        channel_mixes=(("mix_key", "time_mix_key"), ("mix_receptance", "time_mix_receptance")),
        form="complement",
    )


def _mixes(at: str, hidden: int, made: RecurrenceSpec) -> dict[str, WeightSpec]:
    weights = {
        f"mix_{name}": mix(f"{at}time_mix_{name}", hidden, "complement")
        for name in ("key", "value", "receptance", "gate")
    }
    shape = (made.heads, made.key_width)
    return {**weights, "decay": numbers(f"{at}time_decay", shape, "negative_exponential")}
