"""A seeded sample of the fuzz of readers: each spoiled file is accepted, or refused in a sentence.

It runs in a process of its own, for each file is read in a fork of a process without threads.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "fuzz_readers.py"


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "seeds"


def fuzzed(seeds: Path, *options: object) -> str:
    command = [sys.executable, str(SCRIPT), "--seeds", str(seeds), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=seeds.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.artifact
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_no_spoiled_file_ends_in_a_traceback_or_at_a_bound(seeds):
    shown = fuzzed(seeds, "--mutations", 80, "--seed", 12)
    total = re.search(r"^all +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)", shown, re.M)
    assert total is not None, shown
    tried, accepted, refused, *faults = map(int, total.groups())
    assert faults == [0, 0, 0, 0], shown
    assert tried == accepted + refused >= 80
    assert accepted > 5 and refused > 30  # files are spoiled, and not all of them beyond reading
