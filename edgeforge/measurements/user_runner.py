"""A program of the user's own on a phone, in place of EdgeForge's worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from device_harness.devices.device import Device
from device_harness.devices.registry import kind_of
from device_harness.errors import DeviceError
from device_harness.measuring.lane import Site
from device_harness.measuring.record import Cell, Measured, Runner, TextCheck
from edgeforge.errors import UsageError
from exporters.manifest import Manifest

if TYPE_CHECKING:
    from device_harness.devices.android.device import AndroidDevice
    from device_harness.devices.android.runner_output import RunnerFigures

_KIND: Final = "android"
_FIGURES: Final = (
    "load_seconds",
    "first_token_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
)


@dataclass(frozen=True)
class UserRunner:
    """A program to run.

    Attributes:
        path: on this host, built for the device.
        arguments: of the program; names of the artifact's files need no folder.
    """

    path: Path
    arguments: tuple[str, ...]

    def require_devices(self, devices: Sequence[str]) -> None:
        """Refuses devices on which no such program runs.

        Raises:
            UsageError: names the device.
        """
        for name in devices:
            if kind_of(name) != _KIND:
                raise UsageError(
                    f"--runner runs a program on a phone, and {name} is none: name one, such as "
                    f"--device android"
                )
        if not self.path.is_file():
            raise UsageError(f"--runner {self.path} is no file")


def run_on(
    site: Site, device: Device, runner: UserRunner, artifact: Measured, manifest: Manifest
) -> Cell:
    """Runs the program once beside an artifact, and reads what it prints.

    How often it repeats is its own arguments' affair. What it generates is not checked.

    Args:
        site: where, with the rules for the rest before.
        device: the phone.
        runner: the program.
        artifact: whose files lie in the folder where it runs.
        manifest: the artifact's.
    """
    from device_harness.devices.android.runner import run_runner

    cell = Cell(
        artifact,
        site.name,
        prompt=1,
        output=1,
        rules=site.rules,
        at=site.clock.now(),
        text=TextCheck("not checked", reason="a program of the user's own ran"),
    )
    phone = cast("AndroidDevice", device)  # `require_devices` lets no other kind pass
    rested = site.rest()
    notes = () if rested.cool != "not cool" else ("The device was not cool when it began.",)
    try:
        done = run_runner(phone, runner.path, runner.arguments, (Path(artifact.folder), manifest))
    except DeviceError as error:
        return replace(cell, failure=str(error), notes=notes)
    if done.code:
        words = done.errors.strip().splitlines() or done.output.strip().splitlines() or [""]
        said = f": {words[-1][:300]}" if words[-1] else ""
        failure = f"{runner.path.name} ended with exit code {done.code}{said}"
        return replace(cell, failure=failure, notes=notes)
    if not done.figures:
        failure = f"{runner.path.name} printed no figures that EdgeForge reads"
        return replace(cell, failure=failure, notes=notes)
    first = done.figures[0]
    return replace(
        cell,
        prompt=next((each.prompt_tokens for each in done.figures if each.prompt_tokens), 1),
        output=next((each.output_tokens for each in done.figures if each.output_tokens), 1),
        runtime=first.source,
        processor=first.more.get("backends", ""),
        notes=notes,
        runner=Runner(str(runner.path), runner.arguments, first.source, dict(_flat(done.figures))),
    )


def _flat(rows: Sequence[RunnerFigures]) -> Iterator[tuple[str, float]]:
    """Figures by name; of several rows each has its lengths in front."""
    for row in rows:
        lengths = f"{row.prompt_tokens or 0} + {row.output_tokens or 0}: " if len(rows) > 1 else ""
        for name in _FIGURES:
            value = getattr(row, name)
            if value is not None:
                yield f"{lengths}{name}", float(value)
