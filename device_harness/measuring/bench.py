"""`Bench`: what a measurement found on every device; ``bench.json`` holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from device_harness.measuring.record import Cell, Figure

BENCH_VERSION: Final = 1
KIND: Final = "edgeforge bench"


@dataclass(frozen=True)
class DeviceRecord:
    """A device that cells are of.

    Attributes:
        name: as the user named it.
        facts: `device_harness.devices.device.Facts`; empty where it could not be reached.
        limits: what a run there cannot tell, one sentence each.
        failure: why nothing could be measured there, one sentence; empty where something could.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()
    failure: str = ""

    @property
    def is_emulated(self) -> bool:
        """Whether its processor is emulated, so that times mean nothing."""
        return self.facts.get("emulated") is True


@dataclass(frozen=True)
class ArmRatio:
    """How many times as fast one artifact is as the first, in runs that took turns.

    Attributes:
        figure: ``prefill`` or ``decode``.
        device: where.
        prompt: tokens of the prompt.
        output: tokens generated.
        of: digest of the manifest of the one.
        of_folder: its folder.
        against: digest of the manifest of the first.
        against_folder: its folder.
        value: the median of the pairs' ratios.
        low: the lower end of its 95 % interval; None of fewer than six pairs.
        high: the upper end.
        pairs: of runs.
    """

    figure: Figure
    device: str
    prompt: int
    output: int
    of: str
    of_folder: str
    against: str
    against_folder: str
    value: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class Bench:
    """What a measurement found.

    Attributes:
        devices: every device that was asked for, in order.
        cells: every cell, failed ones too.
        ratios: of artifacts that were measured by turns.
    """

    devices: tuple[DeviceRecord, ...]
    cells: tuple[Cell, ...]
    ratios: tuple[ArmRatio, ...] = ()

    @property
    def only(self) -> Cell:
        """The cell of a measurement of one artifact, on one device, at one pair of lengths.

        Raises:
            ValueError: there are several, or none.
        """
        if len(self.cells) != 1:
            raise ValueError(f"there are {len(self.cells)} cells: look at each of `cells`")
        return self.cells[0]

    @property
    def runtime(self) -> str:
        """Of the only cell: the runtime's name, version and threads."""
        return self.only.runtime

    @property
    def prefill_tokens(self) -> int:
        """Of the only cell: tokens of the prompt."""
        return self.only.prompt

    @property
    def decode_tokens(self) -> int:
        """Of the only cell: tokens that were timed one by one."""
        return self.only.output - 1

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of the only cell: the median of its warm runs; NaN where none counts."""
        return _median(self.only, "prefill")

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the only cell: the median of its warm runs; NaN where none counts."""
        return _median(self.only, "decode")

    @property
    def first_token_seconds(self) -> float:
        """Of the only cell: the median of its warm runs; NaN where none counts."""
        return _median(self.only, "first_token")

    @property
    def load_seconds(self) -> float:
        """Of the only cell: until the model could run, in a fresh process; NaN if not known."""
        cold = self.only.cold
        return math.nan if cold is None or cold.load_seconds is None else cold.load_seconds

    @property
    def peak_bytes(self) -> int:
        """Of the only cell: the peak resident memory of the process that ran it; 0 if not known."""
        return self.only.peak_bytes or 0

    def device(self, name: str) -> DeviceRecord:
        """The record of a device.

        Raises:
            KeyError: there is none.
        """
        for each in self.devices:
            if each.name == name:
                return each
        raise KeyError(name)


def _median(cell: Cell, figure: Figure) -> float:
    summary = cell.summary(figure)
    return math.nan if summary is None else summary.median
