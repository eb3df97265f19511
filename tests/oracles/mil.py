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
    with function({}, opset_version=target):
        made = getattr(builder, operation)(**given)
    results = made if isinstance(made, tuple | list) else (made,)
    if operation.startswith("constexpr_"):
        values = results[0].op.materialized_val_inference()
        values = values if isinstance(values, tuple) else (values,)
    else:
        values = tuple(result.val for result in results)
    assert all(value is not None for value in values), f"{operation} has no value_inference"
    return tuple(np.asarray(value) for value in values)


def mil_types() -> Any:
    """coremltools' element types."""
    _tools()
    from coremltools.converters.mil.mil import types

    return types
