"""aarch64 wheels for Python 3.11, found by pip's own index and pinned by digest."""

from __future__ import annotations

import json
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from device_harness.child_process import module_command, python_environment
from device_harness.devices.arm64.programs import run_program
from device_harness.errors import SetupError

_PLATFORMS: Final = (
    "manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Where a wheel is.

    Attributes:
        address: of the file.
        sha256: what the index says of it.
    """

    address: str
    sha256: str


def find_wheel(name: str, version: str) -> Found:
    """Asks pip where the wheel for aarch64 is; its settings, index and proxy hold.

    Raises:
        SetupError: pip is missing, or finds no such wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        wanted = ["--dry-run", "--ignore-installed", "--target", folder, "--report", str(report)]
        asked = _pip("install", [*wanted, f"{name}=={version}"])
        try:
            content = json.loads(report.read_text(encoding="utf-8"))
            info = content["install"][0]["download_info"]
            hashes = info["archive_info"].get("hashes", {})
            return Found(info["url"], hashes.get("sha256", ""))
        except (OSError, ValueError, KeyError, IndexError):
            raise SetupError(
                f"pip finds no aarch64 wheel of {name} {version} for Python 3.11: {_last(asked)}"
            ) from None


def download_wheel(name: str, version: str, folder: Path) -> Path:
    """Has pip download a wheel, from an index that wants more than an address.

    Args:
        name: of the distribution.
        version: of it.
        folder: takes the file, under the wheel's own name.

    Raises:
        SetupError: pip is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = _pip("download", ["--dest", str(folder), f"{name}=={version}"])
    found = next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)
    if asked.returncode or found is None:
        raise SetupError(
            f"pip cannot download the aarch64 wheel of {name} {version}: {_last(asked)}"
        )
    return found


def _pip(command: str, options: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs pip for Python 3.11 on aarch64."""
    words = module_command("pip", command, "--quiet", "--disable-pip-version-check")
    words += ["--no-input", "--no-deps", "--only-binary=:all:"]
    words += ["--python-version=3.11", "--implementation=cp", "--abi=cp311"]
    words += [f"--platform={platform}" for platform in _PLATFORMS]
    return run_program([*words, *options], {**python_environment(), "PIP_NO_COLOR": "1"})


def _last(asked: subprocess.CompletedProcess[str]) -> str:
    """The last thing that pip said."""
    said = [line for line in asked.stderr.splitlines() if line.strip()]
    return said[-1].strip()[:300] if said else f"exit code {asked.returncode}"


def unpack_wheel(
    wheel: Path, folder: Path, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """Unpacks a wheel's files below a folder and returns their paths.

    Args:
        wheel: the file.
        folder: takes the files.
        wanted: is given a path like ``numpy/__init__.py``.

    Raises:
        SetupError: the wheel is damaged.
    """
    done = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if not member.is_dir() and wanted(member.filename):
                    archive.extract(member, folder)  # keeps paths inside of the folder
                    done.append(member.filename)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise SetupError(f"{wheel} is damaged: {error}") from error
    return done
