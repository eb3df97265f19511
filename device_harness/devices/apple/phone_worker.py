"""Serves a Core ML artifact on an iPhone, as `device_harness.worker` serves one on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from device_harness.coreml_session import COMPUTE_UNITS
from device_harness.devices.apple.phone_session import PhoneSession
from device_harness.errors import DeviceError
from device_harness.worker import serve_opened
from exporters.coreml import names
from exporters.coreml.package import open_package
from exporters.manifest import Manifest


def main() -> None:
    """Serves the artifact named on the command line until stdin ends."""
    parser = argparse.ArgumentParser(prog="device_harness.devices.apple.phone_worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--udid", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--options", type=json.loads, default={})
    asked = parser.parse_args()
    serve_opened(lambda: open_on_phone(asked.folder, asked.udid, asked.options))


def open_on_phone(folder: Path, udid: str, options: Mapping[str, Any]) -> PhoneSession:
    """Builds and starts the runner, and opens an artifact in it.

    Args:
        folder: the artifact.
        udid: the phone's UDID.
        options: of the runtime: ``compute_units``.

    Raises:
        DeviceError: an option cannot be, or the phone cannot be made ready.
        ExportError: the artifact is damaged.
    """
    from device_harness.devices.apple.remote import RemoteRunner

    units = options.get("compute_units") or "all"
    if units not in COMPUTE_UNITS:
        raise DeviceError(
            f"there are no compute units {units}; there are {', '.join(COMPUTE_UNITS)}"
        )
    others = sorted(set(options) - {"compute_units"})
    if others:
        raise DeviceError(f"an iPhone has no option --{others[0].replace('_', '-')}: leave it out")
    package = open_package(folder / names.PACKAGE)
    context = Manifest.read(folder).context
    return PhoneSession(package, context, RemoteRunner(package.path, udid, units))
