"""coremltools' own idea of what an operation gives: its ``value_inference``."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np


@cache
def _tools() -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
        from coremltools.converters.mil.mil import Builder, Function
    return coremltools, Function, Builder


def inferred(operation: str, opset: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """Results of an operation on constants.

    Raises:
        AssertionError: coremltools does not infer them.
    """
    tools, function, builder = _tools()
    target = getattr(tools.target, opset)
    if operation.startswith("constexpr_") and opset == "iOS18":
        given = {name: _narrow(name, value) for name, value in given.items()}
    with function({}, opset_version=target):
        made = getattr(builder, operation)(**given)
    results = made if isinstance(made, tuple | list) else (made,)
    if operation.startswith("constexpr_") or operation == "dequantize":
        values = results[0].op.materialized_val_inference()
        values = values if isinstance(values, tuple) else (values,)
    else:
        values = tuple(result.val for result in results)
    assert all(value is not None for value in values), f"{operation} has no value_inference"
    return tuple(np.asarray(value) for value in values)


def _narrow(name: str, value: Any) -> Any:
    """Masks of one bit and indices of two, in the types that coremltools has for them."""
    from coremltools.converters.mil.mil import types

    if name in ("mask", "indices_mask", "data_mask"):
        return value.astype(types.np_uint1_dtype)
    return value.astype(types.np_uint2_dtype) if name == "indices_nonzero_data" else value
