"""Collects the names that ``edgeforge list`` prints."""

from __future__ import annotations

from edgeforge.errors import UsageError
from quant.suggestion import did_you_mean


def catalogue(what: str) -> dict[str, str]:
    """Returns names, each with one line about it.

    Args:
        what: ``families``, ``recipes``, ``rotations``, ``targets``, ``presets``, ``phones`` or
            ``coreml-operations``.

    Raises:
        UsageError: there is no such list.
    """
    kinds = {
        "families": _families,
        "recipes": _recipes,
        "rotations": _rotations,
        "targets": _targets,
        "presets": _presets,
        "phones": _phones,
        "coreml-operations": _coreml_operations,
    }
    if what not in kinds:
        hint = did_you_mean(what, kinds)
        raise UsageError(f"there is no list of {what!r}{hint}; known: {', '.join(kinds)}")
    return kinds[what]()


def _families() -> dict[str, str]:
    import sys

    from edgeforge.families.registry import FAMILIES

    modules = {name: sys.modules[reader.__module__].__doc__ for name, reader in FAMILIES.items()}
    return {name: (doc or "").splitlines()[0].rstrip(".") for name, doc in modules.items()}


def _recipes() -> dict[str, str]:
    from edgeforge.planning.choose import PLANNED
    from quant.plans.recipes import RECIPES

    return {**{name: recipe.about for name, recipe in RECIPES.items()}, **PLANNED}


def _rotations() -> dict[str, str]:
    from edgeforge.model.rotations import ROTATIONS

    return {name: kind.about for name, kind in ROTATIONS.items()}


def _targets() -> dict[str, str]:
    from exporters.registry import TARGETS

    return {name: target.about for name, target in TARGETS.items()}


def _presets() -> dict[str, str]:
    from edgeforge.synth.synthesise import PRESETS

    return {
        name: f"{preset.parameters:,} parameters, {preset.model_type}"
        for name, preset in PRESETS.items()
    }


def _phones() -> dict[str, str]:
    from edgeforge.forecast.profiles import load_profiles

    return {
        name: f"{phone.title}: {phone.soc.value}, {phone.memory.number:g} GB"
        + (f", {phone.bandwidth.number:g} GB/s" if phone.bandwidth else "")
        for name, phone in load_profiles().phones.items()
    }


def _coreml_operations() -> dict[str, str]:
    from device_harness.coreml_interpreter.registry import GROUPS

    return {name: group for group, operations in GROUPS.items() for name in sorted(operations)}
