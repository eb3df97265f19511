"""What one artifact does on an iPhone, step by step, as JSON that a person can send back.

``python -m device_harness.devices.apple.report FOLDER --udid UDID`` prints the seconds of getting
ready, and for each function those of loading it, of its first call and of further calls, apart, and
its compute plan by operator. Where `edgeforge bench --device ios` follows texts, this looks at
single calls, as coremltools' own ``MLModelBenchmarker`` does.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from device_harness.coreml_session import COMPUTE_UNITS
from device_harness.devices.apple.compute_plan import read_plan, sections_of
from device_harness.devices.apple.devicectl import choose_phone
from device_harness.devices.apple.iphone import LIMITS
from device_harness.devices.apple.phone_session import Runner, chunks_of
from device_harness.errors import DeviceError
from exporters.coreml import names
from exporters.coreml.package import Package, open_package
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.structure import to_json

SCHEMA_VERSION: Final = 1


class PlannedRunner(Runner, Protocol):
    """A runner that also tells compute plans."""

    def compute_plan(self, key: str) -> Mapping[str, Any]:
        """Returns the compute plan of a loaded function, as the runner sends it."""


@dataclass(frozen=True)
class FunctionTimes:
    """One function's seconds on the phone.

    Attributes:
        function: its name.
        tokens: how many tokens each call takes.
        load_seconds: that loading took.
        warm_up_seconds: of the first call.
        trial_seconds: of each further call, at the same position.
        plan: operators by processor, as tables in JSON.
    """

    function: str
    tokens: int
    load_seconds: float
    warm_up_seconds: float
    trial_seconds: tuple[float, ...]
    plan: Mapping[str, object]


def examine(package: Package, runner: PlannedRunner, trials: int) -> list[FunctionTimes]:
    """Loads and calls every function of a package.

    Args:
        package: the package.
        runner: runs its functions.
        trials: how many calls to time after the first.

    Raises:
        DeviceError: a call fails.
    """
    found = []
    for function in package.functions:
        loaded, tokens = runner.load(function), max(chunks_of(package.interface(function)))
        inputs = _inputs(package, function, tokens)
        seconds = [runner.call(loaded.key, inputs)[1] for _ in range(trials + 1)]
        plan = read_plan(runner.compute_plan(loaded.key), function)
        found.append(
            FunctionTimes(
                function=function,
                tokens=tokens,
                load_seconds=loaded.seconds,
                warm_up_seconds=seconds[0],
                trial_seconds=tuple(seconds[1:]),
                plan=to_json(sections_of(plan, package, function)),
            )
        )
    return found


def report(folder: Path, udid: str, units: str, trials: int) -> dict[str, object]:
    """Returns the report of an artifact on a phone.

    Raises:
        DeviceError: the phone cannot be made ready, or a call fails.
        ExportError: the artifact is damaged.
    """
    from device_harness.devices.apple.remote import RemoteRunner

    phone = choose_phone(udid)
    manifest = Manifest.read(folder)
    if manifest.target != "coreml":
        raise DeviceError(f"an iPhone runs coreml artifacts, and {folder} is for {manifest.target}")
    package = open_package(folder / names.PACKAGE)
    runner = RemoteRunner(package.path, phone.udid, units)
    try:
        functions = examine(package, runner, trials)
    finally:
        runner.close()
    return {
        "schema_version": SCHEMA_VERSION,
        "model": phone.model,
        "system": f"iOS {phone.ios} ({phone.build})",
        "runtime": runner.runtime,
        "source": manifest.source.model,
        "recipe": manifest.recipe,
        "context": manifest.context,
        "prepared_seconds": dict(runner.prepared),
        "functions": [asdict(each) for each in functions],
        "limits": list(LIMITS),
    }


def main(words: Sequence[str] | None = None) -> None:
    """Prints the report of the artifact named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m device_harness.devices.apple.report")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--udid", default="")
    parser.add_argument("--compute-units", choices=COMPUTE_UNITS, default="all")
    parser.add_argument("--trials", type=int, default=10)
    asked = parser.parse_args(words)
    if not 1 <= asked.trials <= 1000:
        parser.error("--trials must be 1 to 1000")
    try:
        found = report(asked.folder, asked.udid, asked.compute_units, asked.trials)
    except (DeviceError, ExportError) as error:
        sys.exit(f"edgeforge: {error}")
    print(json.dumps(found, indent=1))


def _inputs(package: Package, function: str, tokens: int) -> dict[str, npt.NDArray[Any]]:
    """Tokens at position 0, and caches of zeros where they are inputs."""
    given: dict[str, npt.NDArray[Any]] = {
        names.TOKENS: np.ones((1, tokens), np.int32),
        names.POSITION: np.zeros(1, np.int32),
    }
    for feature in package.interface(function).inputs:
        if feature.name not in given:
            given[feature.name] = np.zeros(feature.shape, np.float16)
    return given


if __name__ == "__main__":
    main()
