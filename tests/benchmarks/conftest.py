"""The scripts import each other by name, so their folder is on the path while a test runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports a module of ``benchmarks/``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
