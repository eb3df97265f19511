"""A sample of `tests/edgeforge/killed_exports.py`: SIGKILL while an old artifact is replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_exports.py")


@pytest.mark.artifact
def test_nothing_is_lost_when_an_export_is_killed():
    options = ("--kills", "2", "--seed", "1", "--recipes", "int4-g32", "--operations-only")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("over an old one: killed at") == 2, done.stdout
    assert "2 kills: nothing was lost" in done.stdout
