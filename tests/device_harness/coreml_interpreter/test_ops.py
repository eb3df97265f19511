"""Every operation of the interpreter against coremltools' own inference, PyTorch or NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_harness.coreml_interpreter.arguments import parameters, tensor_of
from device_harness.coreml_interpreter.ops.kinds import Making
from device_harness.coreml_interpreter.registry import OPS, VIEWS
from device_harness.coreml_interpreter.values import held
from device_harness.coreml_interpreter.weights import Budget
from exporters.coreml.constants import Constant
from tests.oracles.mil import inferred
from tests.oracles.mil_rows import IN_PROGRAMS, MIL, ROWS, Draw

NAMES = {
    "float16": "fp16",
    "float32": "fp32",
    "bool": "bool",
}


def test_every_operation_has_a_row() -> None:
    assert set(OPS) == set(ROWS) | IN_PROGRAMS
    assert set(OPS) >= VIEWS


@pytest.mark.parametrize("operation", sorted(ROWS))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_it_gives_what_others_say(operation: str, data: st.DataObject) -> None:
    row = ROWS[operation]
    drawn = row.make(Draw(data))
    if row.oracle == MIL:
        wanted = inferred(operation, row.opset, drawn)
    else:
        said = row.oracle(**drawn)
        wanted = tuple(np.asarray(each) for each in (said if isinstance(said, tuple) else (said,)))
    tensors, found = run(operation, drawn)
    assert len(found) == len(wanted)
    for value, expected in zip(found, wanted, strict=True):
        assert list(value.shape) == list(expected.shape)
        np.testing.assert_allclose(
            value.numpy().astype(np.float64),
            expected.astype(np.float64),
            rtol=row.tolerance,
            atol=row.tolerance,
        )
        if operation not in VIEWS and not operation.startswith("constexpr_"):
            memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            assert value.untyped_storage().data_ptr() not in memory


def run(operation: str, given: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors that an operation was given, and what it made."""
    function = OPS[operation]
    wanted = parameters(function)
    constant = operation.startswith("constexpr_")
    arguments: dict[str, Any] = {}
    tensors: list[torch.Tensor] = []
    for name, value in given.items():
        if isinstance(value, list):
            value = [as_tensor(each) for each in value]
            tensors += value
        elif not isinstance(value, str):
            value = as_constant(value) if constant else as_tensor(value)
            tensors += [] if constant else [value]
        arguments[name] = wanted[name].convert(value)
    if constant:
        arguments["making"] = Making(False, Budget(0))
    with torch.inference_mode():
        made = function(**arguments)
        results = made if isinstance(made, tuple) else (made,)
        return tensors, [tensor_of(result) for result in results]


def as_tensor(value: Any) -> torch.Tensor:
    array = np.asarray(value)
    return held(array, NAMES.get(array.dtype.name, array.dtype.name))


def as_constant(value: Any) -> Constant:
    array = np.asarray(value)
    return Constant(NAMES.get(array.dtype.name, array.dtype.name), array.shape, array)
