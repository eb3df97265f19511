"""How counted instructions are told: millions, and ratios to the first artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from device_harness.devices.arm64.instructions import Instructions

_SHOWN: Final = ("dot", "i8mm", "sve")


def instruction_lines(names: Sequence[str], found: Sequence[Instructions]) -> list[str]:
    """A line for each artifact, with its ratio to the first.

    Args:
        names: the artifacts.
        found: what was counted of them, all on one core.
    """
    first, width = found[0], max(8, *map(len, names))
    heads = ["prefill", "ratio", "a token", "ratio", *_SHOWN]
    lines = [
        f"{first.device}: {first.prompt} tokens in one call, then {first.output - 1} one by one; "
        f"in millions",
        f"{'':<{width}}" + "".join(f"{head:>9}" for head in heads),
    ]
    for name, each in zip(names, found, strict=True):
        cells = [
            _millions(each.prefill["all"]),
            _ratio(each.prefill, first.prefill),
            _millions(each.decode["all"]),
            _ratio(each.decode, first.decode),
            *(_share(each, kind) for kind in _SHOWN),
        ]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>9}" for cell in cells))
    same = all(each.tokens == first.tokens for each in found)
    lines.append("dot, i8mm and sve: their share of the instructions of prefill and of a token.")
    lines.append("Instructions are a cost to compare artifacts by on one core, and no latency.")
    if not same:
        lines.append("The artifacts generated different tokens.")
    return lines


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}" if count < 1e8 else f"{count / 1e6:.0f}"


def _ratio(one: Mapping[str, float], other: Mapping[str, float]) -> str:
    return f"{one['all'] / other['all']:.3f}"


def _share(each: Instructions, kind: str) -> str:
    both = (part[kind] / part["all"] for part in (each.prefill, each.decode))
    return "/".join(f"{100 * share:.0f}" for share in both) + "%"
