"""The interpreter's operations take every argument that coremltools' take, with its default."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from device_harness.coreml_interpreter.arguments import parameters
from device_harness.coreml_interpreter.registry import OPS

# Not arguments in a package: the blocks of control flow, and what the interpreter itself gives.
BLOCKS = {"_true_fn", "_false_fn", "_existing_blocks", "_cond", "_body"}
OWN = {"making", "blocks"}
# Operations that a package holds but no builder of coremltools makes.
BEYOND = {"write_state", "coreml_update_state"}
# The results are the same whatever these say, so an operation may leave them unread: elements are
# always sorted, and indices are always checked.
WITHOUT_EFFECT = {
    ("topk", "sort"),
    ("gather", "validate_indices"),
    ("gather_along_axis", "validate_indices"),
    ("gather_nd", "validate_indices"),
    ("scatter", "validate_indices"),
    ("scatter_along_axis", "validate_indices"),
    ("scatter_nd", "validate_indices"),
}
# A default that is a number in coremltools, and here made by the operation when None is given.
MADE = {
    ("fill", "value"),
    ("fill_like", "value"),
    ("one_hot", "on_value"),
    ("one_hot", "off_value"),
}
# iOS 16's form of these operations needs a shape, and iOS 18's has none.
SHAPED = {"constexpr_lut_to_dense", "constexpr_sparse_to_dense"}


@pytest.fixture(scope="module")
def registry() -> dict[str, dict[Any, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools  # noqa: F401
        from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
    found: dict[str, dict[Any, Any]] = SSAOpRegistry.core_ops
    return found


def inputs(registry: dict[str, dict[Any, Any]]) -> Iterator[tuple[str, Any, str, Any]]:
    """Operation, its class in one opset, argument and argument's type, of all that we run."""
    for name in OPS.keys() & registry.keys():
        for kind in registry[name].values():
            for argument, given in kind.input_spec.input_types.items():
                if argument not in BLOCKS:
                    yield name, kind, argument, given


def test_no_argument_is_missing(registry: dict[str, dict[Any, Any]]) -> None:
    theirs: dict[str, set[str]] = {name: set() for name in OPS.keys() - BEYOND}
    for name, _, argument, _ in inputs(registry):
        theirs[name].add(argument)
    ours = {name: parameters(OPS[name]).keys() - OWN for name in OPS.keys() - BEYOND}
    assert ours == theirs


def test_what_may_be_left_out_has_the_same_default(registry: dict[str, dict[Any, Any]]) -> None:
    checked = 0
    for name, kind, argument, given in inputs(registry):
        if not given.optional:
            continue
        default = inspect.signature(OPS[name]).parameters[argument].default
        assert default is not inspect.Parameter.empty, (name, argument)
        try:
            defaults = kind.default_inputs(object.__new__(kind))
        except AttributeError:  # it depends on the other arguments
            continue
        wanted = dict(defaults.items()).get(argument)
        checked += 1
        assert default == wanted or (name, argument) in MADE, (name, argument, wanted)
    assert checked > 100


@pytest.mark.parametrize("name", sorted(OPS))
def test_no_argument_is_taken_and_left_unread(name: str) -> None:
    # `getsource` follows a wrapped function to where it is written.
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(OPS[name]))).body
    if not isinstance(function, ast.FunctionDef):
        pytest.fail(f"{name} is no function")
    read = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    unread = set(parameters(OPS[name])) - read
    assert unread == {argument for each, argument in WITHOUT_EFFECT if each == name}
