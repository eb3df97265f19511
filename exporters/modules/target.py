"""What a target of modules implements, and what it is given and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from exporters.modules.traced import TracedModule

if TYPE_CHECKING:
    from quant.formats.formats import WeightFormat
    from quant.store.store import WeightStore


@dataclass(frozen=True)
class ModuleRequest:
    """What a target writes.

    Attributes:
        traced: the traced module.
        store: the quantized weights; None where the recipe quantizes none. Weights that the store's
            plan does not name stay as they are in the program.
    """

    traced: TracedModule
    store: WeightStore | None

    def format_of(self, weight: str) -> WeightFormat | None:
        """The format of a quantized weight; None for one that stays float."""
        if self.store is None or weight not in self.store.plan.weights:
            return None
        return self.store.plan.weights[weight].format


@dataclass(frozen=True)
class LoweredModule:
    """What a target wrote.

    Attributes:
        entry: the file or folder that a runtime opens.
        floats: of every quantized weight that the files hold as dequantized floats, the reason.
        notes: what a user must know, one sentence each.
    """

    entry: str
    floats: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class ModuleTarget(Protocol):
    """A target that modules are written for."""

    @property
    def name(self) -> str:
        """The name that the command line takes."""

    @property
    def tolerance(self) -> float:
        """The largest difference from the quantized module that passes, relative to its range."""

    def write(self, request: ModuleRequest, folder: Path) -> LoweredModule:
        """Writes the artifact's files.

        Raises:
            ExportError: the target or its frontend cannot hold the module.
        """

    def stored_digests(
        self, folder: Path, entry: str, formats: Mapping[str, WeightFormat]
    ) -> Mapping[str, str]:
        """`quant.store.store.weight_digest` of every weight that the files hold as integers.

        Args:
            folder: the artifact.
            entry: the manifest's entry.
            formats: the formats of the weights to look for, by name.
        """
