"""What a user asks of a verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from device_harness.devices.registry import DEFAULT, kind_of
from edgeforge.errors import UsageError
from edgeforge.verification.sample import TokenCount

_KLEIDIAI: Final[dict[str, tuple[dict[str, str | None], ...]]] = {
    "on": ({"kleidiai": "on"},),
    "off": ({"kleidiai": "off"},),
    "both": ({"kleidiai": "on"}, {"kleidiai": "off"}),
}


@dataclass(frozen=True)
class OnDevice:
    """A device on which to verify, too.

    Attributes:
        name: as ``--device`` takes it.
        runtime: options of the runtime there, by name; those that a target's runtime does not take
            are left out for it.
    """

    name: str
    runtime: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name, and the runtime's options there."""
        words = [f"{name} {value}" for name, value in self.runtime.items() if value is not None]
        return ", ".join([self.name, *words])


@dataclass(frozen=True)
class VerifyOptions:
    """What a user asks of a verification.

    Attributes:
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it, spread over the whole text, or ``all``; None for 8,192
            (2,048 for models over 50 M parameters).
        checkpoint: where the checkpoint is now; None for where the manifest says.
        threads: for the runtime; None for its default here.
        timed: whether to time the artifact too.
        runtime: options of the runtime, by name; None leaves it its default.
        bounds: of figures, by their names, instead of the target's own.
        against: a program of others that FLOAT is held against; None for none.
        devices: where to run the artifacts too, beside this host.
    """

    text: Path | None = None
    tokens: TokenCount | None = None
    checkpoint: str | None = None
    threads: int | None = None
    timed: bool = True
    runtime: Mapping[str, str | None] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    against: str | None = None
    devices: tuple[OnDevice, ...] = ()


def devices_of(names: Sequence[str], kleidiai: str | None = None) -> tuple[OnDevice, ...]:
    """The devices of ``--device``, each once; this host, where everything runs anyway, is left out.

    Args:
        names: as ``--device`` takes them.
        kleidiai: ``on``, ``off`` or ``both``: whether onnxruntime uses KleidiAI's kernels there.

    Raises:
        UsageError: ``kleidiai`` is none of these, or there is no device that it could be for.
        DeviceError: there is no such device.
    """
    if kleidiai not in (None, *_KLEIDIAI):
        raise UsageError(f"--kleidiai is {kleidiai!r}: give one of {', '.join(_KLEIDIAI)}")
    chosen = [name for name in dict.fromkeys(names) if kind_of(name) != DEFAULT]
    if kleidiai is not None and not chosen:
        raise UsageError("--kleidiai is for a --device with an arm64 processor: name one")
    settings = _KLEIDIAI[kleidiai] if kleidiai else ({},)
    return tuple(OnDevice(name, runtime) for name in chosen for runtime in settings)
