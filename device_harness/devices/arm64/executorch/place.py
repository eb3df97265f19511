"""Where ExecuTorch's runtime for arm64 is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from device_harness.devices.arm64.pins import Pins
from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.root import what_is_wrong
from device_harness.errors import SetupError

_HERE: Final = Path(__file__).parent
# Counts up when the same downloads are unpacked or linked in another way.
_BUILD: Final = 2


def executorch_folder(pins: Pins) -> Path:
    """Where the runtime of these pins is, or would be."""
    sources = "".join((_HERE / name).read_text() for name in ("shim.cpp", "stub_torch_python.s"))
    own = hashlib.sha256(sources.encode()).hexdigest()[:8]
    return arm64_folder() / f"executorch-{pins.digest('executorch')}-{own}-{_BUILD}"


def find_executorch(pins: Pins) -> Path:
    """Returns the folder of the runtime that was set up.

    Raises:
        SetupError: there is none, or it is not whole.
    """
    folder = executorch_folder(pins)
    cure = "run `edgeforge devices setup arm64 --executorch`"
    if not folder.is_dir():
        raise SetupError(f"ExecuTorch's kernels for arm64 are not set up: {cure} once")
    if wrong := what_is_wrong(folder):
        raise SetupError(
            f"ExecuTorch's kernels for arm64 in {folder} are not whole ({wrong}): {cure}"
        )
    return folder
