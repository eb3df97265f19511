"""`ModuleOptions`: what a user asks of the export of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeforge.modules.samples import Arrays


@dataclass(frozen=True)
class ModuleOptions:
    """The options of `edgeforge.modules.export.export`.

    Attributes:
        recipe: the recipe's name, or a YAML file of rules.
        source: what the module came from, for the manifest.
        inputs: inputs to verify on; empty for the example inputs and random ones.
        calibration: inputs that calibrated algorithms are given; empty for ``inputs``, or else for
            the example inputs.
        sidecars: files to copy beside the model, by their names there: a tokenizer.
        notes: what the manifest says beside what the target says.
        seed: of the random inputs.
        force: whether to replace an existing output folder.
        threads: for quantization; None for one per processor, at most four.
    """

    recipe: str
    source: str = ""
    inputs: Sequence[Arrays] = ()
    calibration: Sequence[Arrays] = ()
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int = 0
    force: bool = False
    threads: int | None = None
