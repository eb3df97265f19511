"""Whether an artifact had to be put on a device, so that its first run there is the first ever."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from device_harness.devices.device import Device


@runtime_checkable
class Counts(Protocol):
    """A device that counts what is sent to it."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of files that were sent to it since it was opened."""


class Sending:
    """Tells whether opening an artifact sent files to a device.

    Args:
        device: where; one that counts nothing does not tell.
    """

    def __init__(self, device: Device) -> None:
        self._device = device if isinstance(device, Counts) else None
        self._before = 0

    def begin(self) -> None:
        """Notes what was sent before the artifact is opened."""
        if self._device is not None:
            self._before = self._device.sent_bytes

    def was_needed(self) -> bool | None:
        """Whether something was sent since; None where the device does not say."""
        return None if self._device is None else self._device.sent_bytes > self._before
