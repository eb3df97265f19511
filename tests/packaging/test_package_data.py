"""Files beside the Python code, which a wheel must hold too."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("edgeforge", "device_harness", "exporters", "quant")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_that_is_no_code_is_in_the_wheel(folder):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"][folder]
    listed = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [name.partition("/")[2] for name in listed.stdout.split("\0") if name]
    data = [name for name in names if not name.endswith(".py")]
    assert data
    missing = [
        name
        for name in data
        if not any(
            PurePath(name).match(pattern) and name.count("/") == pattern.count("/")
            for pattern in patterns
        )
    ]
    assert missing == []
