"""Speeds side by side, from ``bench.json`` files alone; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Literal

from device_harness.measuring.bench import ArmRatio, Bench, DeviceRecord
from device_harness.measuring.record import Cell, Figure
from device_harness.measuring.record_json import figures_json
from edgeforge.errors import UsageError
from edgeforge.measurements.bench_file import BENCH, of_artifact, read_bench_file
from edgeforge.verification.freshness import sha256_of
from exporters.manifest import MANIFEST, MODULE_MANIFEST
from exporters.modules.manifest import is_module

SPEEDS: Final[tuple[Figure, ...]] = ("prefill", "decode")
Outcome = Literal["faster", "slower", "not told apart"]
Point = tuple[str, int, int, tuple[tuple[str, str], ...]]
"""A device, lengths of prompt and output, and of modules the inputs of a call."""


@dataclass(frozen=True)
class Side:
    """One of what is compared: an artifact, as one file has it.

    Attributes:
        name: what to call it.
        manifest: digest of the artifact's manifest.
        bench: the file's share of it.
    """

    name: str
    manifest: str
    bench: Bench


@dataclass(frozen=True)
class SpeedRatio:
    """How many times as fast a side is as the first.

    Attributes:
        side: its place, from 0.
        figure: ``prefill`` or ``decode``.
        value: by turns the median of the pairs' ratios, else the ratio of the medians.
        low: the lower end of the 95 % interval; None where there is none.
        high: the upper end.
        by_turns: whether the two took turns; if not, their devices' days differ, too.
        outcome: what the interval tells, or whether any two runs overlap where there is none.
    """

    side: int
    figure: Figure
    value: float
    low: float | None
    high: float | None
    by_turns: bool
    outcome: Outcome


@dataclass(frozen=True)
class SpeedGroup:
    """One device and one pair of lengths.

    Attributes:
        device: the device.
        prompt: tokens of the prompt.
        output: tokens generated.
        cells: of each side; None where it was not measured so.
        ratios: of the others to the first.
        shapes: of modules, the inputs of a call by name, each as ``dtype[dims]``; else empty.
    """

    device: DeviceRecord
    prompt: int
    output: int
    cells: tuple[Cell | None, ...]
    ratios: tuple[SpeedRatio, ...]
    shapes: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "device": self.device.name,
            "emulated": self.device.is_emulated,
            "prompt": self.prompt,
            "output": self.output,
            "shapes": dict(self.shapes),
            "figures": [None if cell is None else figures_json(cell) for cell in self.cells],
            "ratios": [asdict(each) for each in self.ratios],
        }


@dataclass(frozen=True)
class Speeds:
    """What was measured of some sides.

    Attributes:
        sides: all of them; the first is what the others are held against.
        groups: by device and lengths.
    """

    sides: tuple[Side, ...]
    groups: tuple[SpeedGroup, ...]

    def to_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "sides": [{"name": each.name, "manifest": each.manifest} for each in self.sides],
            "groups": [each.to_json() for each in self.groups],
        }


def sides_of_file(path: Path) -> list[Side]:
    """The artifacts of a ``bench.json``.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        bench = read_bench_file(path)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: `edgeforge bench` writes it") from None
    folders = {cell.artifact.manifest: cell.artifact.folder for cell in bench.cells}
    return [
        Side(f"{path}: {folder}", manifest, of_artifact(bench, manifest))
        for manifest, folder in folders.items()
    ]


def side_of_artifact(folder: Path) -> Side | None:
    """What was measured of an artifact as it is now; None where nothing was.

    Raises:
        UsageError: its ``bench.json`` cannot be read.
    """
    path = folder / BENCH
    if not path.is_file():
        return None
    manifest = sha256_of(folder / (MODULE_MANIFEST if is_module(folder) else MANIFEST))
    own = of_artifact(read_bench_file(path), manifest)
    return Side(str(folder), manifest, own) if own.cells else None


def compare_speeds(sides: Sequence[Side]) -> Speeds:
    """Holds sides against the first, device by device and length by length."""
    points = dict.fromkeys(_point(cell) for side in sides for cell in side.bench.cells)
    return Speeds(tuple(sides), tuple(_group(sides, point) for point in points))


def _point(cell: Cell) -> Point:
    return cell.device, cell.prompt, cell.output, tuple(cell.shapes.items())


def _group(sides: Sequence[Side], point: Point) -> SpeedGroup:
    device, prompt, output, shapes = point
    cells = tuple(_cell(side, point) for side in sides)
    record = next(each for side in sides for each in side.bench.devices if each.name == device)
    ratios = []
    for place in range(1, len(sides)):
        for figure in SPEEDS[1:] if shapes else SPEEDS:
            found = _ratio(sides, cells, place, figure)
            if found is not None:
                ratios.append(found)
    return SpeedGroup(record, prompt, output, cells, tuple(ratios), dict(shapes))


def _cell(side: Side, point: Point) -> Cell | None:
    """The latest cell of a side there: with other threads or options there may be several."""
    found = [cell for cell in side.bench.cells if _point(cell) == point]
    return max(found, key=lambda cell: cell.at, default=None)


def _ratio(
    sides: Sequence[Side], cells: Sequence[Cell | None], place: int, figure: Figure
) -> SpeedRatio | None:
    own, first = cells[place], cells[0]
    if own is None or first is None:
        return None
    one, other = own.summary(figure), first.summary(figure)
    if one is None or other is None:
        return None
    told = _by_turns(sides[place], sides[0], own, figure)
    if told is None:
        apart = one.smallest > other.largest or one.largest < other.smallest
        value, low, high = one.median / other.median, None, None
    else:
        value, low, high = told
        apart = low is not None and high is not None and (low > 1 or high < 1)
    outcome: Outcome = "not told apart"
    if apart:
        outcome = "faster" if value > 1 else "slower"
    return SpeedRatio(place, figure, value, low, high, told is not None, outcome)


def _by_turns(
    side: Side, first: Side, cell: Cell, figure: Figure
) -> tuple[float, float | None, float | None] | None:
    """The ratio of two that took turns; None where they did not."""
    rows: dict[tuple[str, str], ArmRatio] = {
        (each.of, each.against): each
        for each in side.bench.ratios
        if (each.figure, each.device) == (figure, cell.device)
        and (each.prompt, each.output) == (cell.prompt, cell.output)
    }
    found = rows.get((side.manifest, first.manifest))
    if found is not None:
        return found.value, found.low, found.high
    found = rows.get((first.manifest, side.manifest))
    if found is None:
        return None
    low, high = (None if end is None else 1 / end for end in (found.high, found.low))
    return 1 / found.value, low, high
