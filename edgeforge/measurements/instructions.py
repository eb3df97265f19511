"""Instructions counted on an emulated core, as a cost beside a cell: a ratio, and no latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from device_harness.devices.registry import kind_of
from device_harness.errors import DeviceError
from device_harness.measuring.record import Cell
from edgeforge.errors import UsageError

_COUNTING: Final = "arm64"
"""The kind of device whose emulator counts."""


def require_counting(devices: Sequence[str]) -> None:
    """Refuses to count where no device does.

    Raises:
        UsageError: none of the devices counts instructions.
    """
    if not any(kind_of(name) == _COUNTING for name in devices):
        raise UsageError(
            f"--instructions counts on emulated cores, and {', '.join(devices)} is none: name one, "
            f"such as --device arm64:cortex-a76"
        )


def counted(cell: Cell, folder: Path) -> Cell:
    """A cell with the instructions of its prompt and of one generated token, by class.

    Where they cannot be counted the cell has failed, as they were asked for.

    Args:
        cell: of a device that counts; any other is left as it is.
        folder: the artifact.
    """
    kind, _, core = cell.device.partition(":")
    if kind != _COUNTING or cell.failed:
        return cell
    from device_harness.devices.arm64.instructions import count_instructions

    try:
        found = count_instructions(folder, cell.prompt, max(2, cell.output), core, cell.options)
    except DeviceError as error:
        return replace(cell, failure=f"instructions were not counted: {error}")
    return replace(
        cell,
        instructions={
            **{f"prefill.{name}": count for name, count in found.prefill.items()},
            **{f"decode.{name}": round(count) for name, count in found.decode.items()},
        },
    )
