"""`ModuleEntry`: a module's earlier figures, and whether they got worse on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.gate.metrics import MODULE_COMPARED
from edgeforge.gate.result import Finding
from exporters.manifest_records import integer, mapping, number, text

# Relative differences below that are the order of sums.
_NO_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class ModuleEntry:
    """One artifact's earlier figures.

    Attributes:
        target: the runtime's format.
        recipe: how it was quantized.
        source: digest of the module's parameters and buffers.
        inputs: digest of the inputs that it was run on.
        artifact_bytes: size of all files.
        figures: values by dotted name.
    """

    target: str
    recipe: str
    source: str
    inputs: str
    artifact_bytes: int
    figures: Mapping[str, float]


def read_entry(data: object) -> ModuleEntry:
    """Reads an entry, in the form that ``dataclasses.asdict`` gives.

    Raises:
        TypeError: a field holds what it cannot.
        KeyError: a field is absent.
    """
    row = mapping(data, "an entry of a module")
    figures = mapping(row["figures"], "figures")
    return ModuleEntry(
        **{name: text(row, name) for name in ("target", "recipe", "source", "inputs")},
        artifact_bytes=integer(row, "artifact_bytes"),
        figures={name: number(figures, name) for name in figures},
    )


def require_comparable(path: Path, name: str, before: ModuleEntry, now: ModuleEntry) -> None:
    """Refuses a baseline whose entry is of another module, target or inputs.

    Args:
        path: the baseline's file.
        name: the artifact's, as the baseline has it.
        before: the baseline's entry.
        now: what the entry would be now.

    Raises:
        UsageError: says what differs.
    """
    for key, what, cure in (
        ("target", "another target", ""),
        ("source", "other weights of the module", ""),
        ("inputs", "other inputs", ", so seed what the factory draws, or export with --inputs"),
    ):
        was, found = getattr(before, key), getattr(now, key)
        if was != found:
            raise UsageError(
                f"the baseline {path} has {name} of {what} ({was[:16]}; it is {found[:16]} now), "
                f"which cannot be compared{cure}; if that is what you want, write it anew with "
                f"--update-baseline"
            )


def compare(before: ModuleEntry, now: ModuleEntry, worse_by: Mapping[str, float]) -> list[Finding]:
    """Holds figures against a baseline's on the same inputs; there is no interval.

    Args:
        before: the baseline's entry.
        now: what it would be now.
        worse_by: by which share of the baseline's a figure may change, by its name.
    """
    found = []
    for name, usual in MODULE_COMPARED.items():
        if name not in before.figures or name not in now.figures:
            continue
        was, value = before.figures[name], now.figures[name]
        allowed, change = max(worse_by.get(name, usual) * was, _NO_DIFFERENCE), value - was
        failed = not math.isfinite(change) or change > allowed
        words = f"{name} is {value:.3g} and was {was:.3g} in the baseline on the same inputs"
        if failed:
            words += f", which is worse by more than {allowed:.3g}"
            if before.recipe != now.recipe:
                words += f" (the recipe was {before.recipe} and is {now.recipe})"
        found.append(
            Finding(
                metric=name,
                outcome="failed" if failed else "passed",
                kind="baseline",
                message=words,
                value=value,
                baseline=was,
                change=change,
                limit=allowed,
                sense="at most",
                source="the baseline",
            )
        )
    return found
