"""Gives the quantizers' tests their oracles, which lie apart under ``tests/oracles``, and more."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from quant.kernels import native

_ORACLES = Path(__file__).parent.parent / "oracles"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quant_oracle_{name}", _ORACLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def gptq_numpy() -> ModuleType:
    """GPTQ written from the paper, in NumPy."""
    return _load("gptq_numpy")


@pytest.fixture(scope="session")
def smoothquant_numpy() -> ModuleType:
    """SmoothQuant, and products of rounded activations, written from the paper in NumPy."""
    return _load("smoothquant_numpy")


@pytest.fixture(scope="session")
def awq_numpy() -> ModuleType:
    """AWQ written from the paper, in NumPy."""
    return _load("awq_numpy")


@pytest.fixture
def restore_instruction_set() -> Iterator[None]:
    """Lets the kernels use all that the processor has again after a test that limits them."""
    yield
    native.limit_instruction_set(2)
