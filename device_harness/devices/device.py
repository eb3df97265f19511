"""What every kind of device is to those who use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from device_harness.closing import Closing
from device_harness.devices.progress import Progress, no_progress
from exporters.manifest import Manifest


@dataclass(frozen=True)
class Core:
    """One processor core of a device.

    Attributes:
        name: what the device calls it, such as ``cpu0``.
        max_hz: its highest clock in hertz; None where the device does not say.
    """

    name: str
    max_hz: int | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a device and does not change while it works.

    Attributes:
        name: as a user names it, such as ``android:R58M12``.
        kind: its row in the registry, such as ``android``.
        model: what it is, such as ``Pixel 9`` or ``cortex-a76 (emulated)``.
        system: the operating system and its version.
        processor: the processor or system on a chip.
        cores: its cores.
        memory_bytes: its memory; None where it does not say.
        emulated: whether the processor is emulated, so that times mean nothing.
        more: further facts, by name.
    """

    name: str
    kind: str
    model: str
    system: str
    processor: str
    cores: tuple[Core, ...] = ()
    memory_bytes: int | None = None
    emulated: bool = False
    more: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The facts in values that JSON has."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


@dataclass(frozen=True)
class Condition:
    """How a device is at one moment; None and an empty mapping mean that it does not say.

    Attributes:
        at: seconds since 1970, by the clock of the host.
        battery_percent: the charge.
        charging: whether it is charged now.
        temperatures: degrees Celsius, by zone.
        thermal_status: Android's, 0 (none) to 6 (shutdown).
        governors: by core.
        clocks: hertz now, by core.
        clock_limits: the highest hertz that are allowed now, by core.
        available_bytes: memory that a program can still have.
        screen_on: whether the screen is on.
    """

    at: float
    battery_percent: int | None = None
    charging: bool | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)
    thermal_status: int | None = None
    governors: Mapping[str, str] = field(default_factory=dict)
    clocks: Mapping[str, int] = field(default_factory=dict)
    clock_limits: Mapping[str, int] = field(default_factory=dict)
    available_bytes: int | None = None
    screen_on: bool | None = None

    def as_json(self) -> dict[str, Any]:
        """The condition in values that JSON has."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


class Channel(Protocol):
    """A process on a device."""

    @property
    def requests(self) -> BinaryIO:
        """Its stdin."""

    @property
    def answers(self) -> BinaryIO:
        """Its stdout, byte for byte.

        Reading raises TimeoutError, an OSError, where a device is silent for longer than its kind
        allows. A worker is never silent for longer than `device_harness.worker.ALIVE_SECONDS`.
        """

    def wait(self, seconds: float) -> int | None:
        """Waits for its end: the exit code, negative for a signal; None if it still runs."""

    def last_words(self) -> str:
        """The end of what it printed on stderr."""

    def close(self) -> None:
        """Ends it and all that it started; closing again does nothing."""


class Device(Closing, Protocol):
    """A place where artifacts run; close it, or use it in a ``with`` statement.

    Attributes:
        tell: is told how much of what is sent there has arrived, in bytes.
    """

    tell: Progress

    @property
    def name(self) -> str:
        """As a user names it, such as ``arm64:cortex-a76``."""

    @property
    def limits(self) -> tuple[str, ...]:
        """What running an artifact there cannot tell, one sentence each."""

    def facts(self) -> Facts:
        """What is known of it.

        Raises:
            DeviceError: it cannot be reached.
        """

    def condition(self) -> Condition:
        """How it is now.

        Raises:
            DeviceError: it cannot be reached.
        """

    def start(self, folder: Path, manifest: Manifest, arguments: Sequence[str]) -> Channel:
        """Puts an artifact there, if it is not there yet, and starts a worker on it.

        Args:
            folder: the artifact on this host.
            manifest: its manifest.
            arguments: of `device_harness.worker`, after the folder.

        Raises:
            DeviceError: the device cannot be reached, or cannot run this artifact.
        """

    def close(self) -> None:
        """Leaves the device; closing again does nothing."""


class Place(Closing):
    """The part that devices share: most have nothing to leave, and nobody to tell.

    Attributes:
        tell: is told how much of what is sent there has arrived, in bytes.
    """

    tell: Progress = staticmethod(no_progress)

    def close(self) -> None:
        """Leaves the device; there is nothing to do."""


@dataclass(frozen=True)
class Reachable:
    """A device, or a kind of device, and whether it can be used now.

    Attributes:
        name: what ``--device`` takes.
        ready: whether it can be used now.
        what: what it is, or why it cannot be used, in a few words.
        cure: what to do about it, one sentence; empty where it is ready.
    """

    name: str
    ready: bool
    what: str
    cure: str = ""
