"""``bench.json``: read, written whole or not at all, and added to."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Final, TypeVar

from device_harness.measuring.bench import ArmRatio, Bench, DeviceRecord
from device_harness.measuring.record import Cell
from device_harness.measuring.record_json import BenchError, bench_json, read_bench
from edgeforge.errors import UsageError
from edgeforge.output_folder.whole_file import whole_file
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json
from quant.json_output import json_text
from quant.sealed_json import seal, unseal

BENCH: Final = "bench.json"
_LARGEST: Final = 256 << 20
Kept = TypeVar("Kept", Cell, ArmRatio, DeviceRecord)


def read_bench_file(path: Path) -> Bench:
    """Reads a ``bench.json``.

    Raises:
        FileNotFoundError: there is none.
        UsageError: it is none of EdgeForge, of another version, damaged, or changed by hand.
    """
    try:
        content = read_input(path, _LARGEST)
        data = parse_json(content, strict=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except JsonError as error:
        raise UsageError(f"{path} {error}") from None
    try:
        found = read_bench(data)
    except BenchError as error:
        raise UsageError(f"{path} {error}") from None
    try:
        unseal(content)
    except ValueError:
        raise UsageError(
            f"{path} was changed by hand or damaged: its content differs from its digest; measure "
            f"again"
        ) from None
    return found


def write_bench_file(bench: Bench, path: Path) -> None:
    """Writes a ``bench.json``, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    written = seal(json.loads(json_text(bench_json(bench))), indent=1)
    with whole_file(path) as stream:
        stream.write((written + "\n").encode())


def refuse_stranger(path: Path) -> Bench | None:
    """What lies where a ``bench.json`` is to be written; None where nothing does.

    Raises:
        UsageError: something else lies there, or a file that this EdgeForge cannot read.
    """
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: name a file in an existing folder")
        return None
    try:
        return read_bench_file(path)
    except UsageError as error:
        raise UsageError(f"{error}; or name another place with --out") from None


def of_artifact(bench: Bench, manifest: str) -> Bench:
    """The part of a measurement that one artifact has a share in.

    Args:
        bench: of several artifacts.
        manifest: digest of the artifact's manifest.
    """
    cells = tuple(each for each in bench.cells if each.artifact.manifest == manifest)
    ratios = tuple(each for each in bench.ratios if manifest in (each.of, each.against))
    named = {each.device for each in cells}
    return Bench(tuple(each for each in bench.devices if each.name in named), cells, ratios)


def merged(before: Bench | None, now: Bench) -> Bench:
    """What a file holds after a new measurement: the new cells in place of those like them.

    What was measured of other artifacts, on other devices or of other lengths stays.

    Args:
        before: the file's content; None where there was none.
        now: the new measurement.
    """
    if before is None:
        return now
    return Bench(
        devices=_replaced(before.devices, now.devices),
        cells=_replaced(before.cells, now.cells),
        ratios=_replaced(before.ratios, now.ratios),
    )


def add_to_file(bench: Bench, path: Path) -> None:
    """Writes a measurement to a file, beside what other measurements have there.

    Raises:
        UsageError: something else lies there.
        OSError: it cannot be written.
    """
    write_bench_file(merged(refuse_stranger(path), bench), path)


def keep_with_artifacts(bench: Bench) -> list[Path]:
    """Adds each artifact's share to the file in its folder; what is of an earlier export goes.

    Returns:
        The files.

    Raises:
        UsageError: something else lies where one is to be written.
        OSError: one cannot be written.
    """
    written = []
    for manifest, folder in _artifacts(bench).items():
        path = folder / BENCH
        before = refuse_stranger(path)
        old = None if before is None else of_artifact(before, manifest)
        write_bench_file(merged(old, of_artifact(bench, manifest)), path)
        written.append(path)
    return written


def cell_key(cell: Cell) -> tuple[Hashable, ...]:
    """What makes two cells the same: of what, where and how, not when."""
    runner = None if cell.runner is None else (cell.runner.path, cell.runner.arguments)
    return (
        cell.artifact.manifest,
        cell.device,
        cell.prompt,
        cell.output,
        cell.threads,
        tuple(sorted(cell.options.items())),
        runner,
        tuple(sorted(cell.shapes.items())),
    )


def _key(row: Cell | ArmRatio | DeviceRecord) -> tuple[Hashable, ...]:
    if isinstance(row, Cell):
        return cell_key(row)
    if isinstance(row, ArmRatio):
        return row.figure, row.device, row.prompt, row.output, row.of, row.against
    return (row.name,)


def _replaced(old: Iterable[Kept], new: Iterable[Kept]) -> tuple[Kept, ...]:
    found = {_key(row): row for row in old}
    found.update({_key(row): row for row in new})
    return tuple(found.values())


def _artifacts(bench: Bench) -> dict[str, Path]:
    return {each.artifact.manifest: Path(each.artifact.folder) for each in bench.cells}
