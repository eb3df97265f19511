"""Lifts the choice of experts, which kernels of a method compute step by step.

Steps are not matched by their form. They are computed for sample logits, whatever kernels compute
them, and what comes out is compared with the rules of `quant.program.expert_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from exporters.executorch.lifted_method import Method
from exporters.lifted import Array, Constant, Last, Numbers, Unknown, Value
from exporters.lifted_mixture import Route, RouteSparseMixer

_SAME: Final = 1e-5
_ROWS: Final = 16


@dataclass(frozen=True, eq=False)
class Sampled(Value):
    """What kernels make of a router's logits.

    Attributes:
        source: the logits.
        array: the result for sample logits.
        kernel: the last kernel.
        bounds: the numbers that ``gt`` compared with so far.
    """

    source: Value
    array: Array
    kernel: str = ""
    bounds: tuple[float, ...] = ()


def sample_logits(experts: int) -> Array:
    """Logits of some tokens, ``float32[1, n, E]``: far apart, close together, equal, below zero."""
    made = np.random.default_rng(7).normal(size=(4, _ROWS, experts))
    rows = 3 * made[0], 1 + made[1] / 50, np.round(2 * made[2]), -np.abs(made[3]) - 0.5
    return np.concatenate(rows)[None].astype(np.float32)


def sampled_kernel(method: Method, kernel: str, arguments: list[int]) -> bool:
    """Computes a kernel for sample logits; False where an operand is made of something else."""
    count, compute = _STEPS[kernel]
    given = [_operand(method, index) for index in arguments[:count]]
    samples = [each for each in given if isinstance(each, Sampled)]
    sources = {id(each.source) for each in samples}
    if len(sources) != 1 or not all(isinstance(each, Sampled | Constant) for each in given):
        return False
    arrays = [each.array for each in given if isinstance(each, Sampled | Constant)]
    bounds = tuple(dict.fromkeys(bound for each in samples for bound in each.bounds))
    if kernel == "aten::gt":
        bounds = (*bounds, float(arrays[1]))
    name = f"{method.name}, value {arguments[-1]}"
    with np.errstate(all="ignore"):
        array = np.asarray(compute(*arrays))
    method.values[arguments[-1]] = Sampled(name, samples[0].source, array, kernel, bounds)
    return True


def _operand(method: Method, index: int) -> Value:
    value = method.value(index)
    if isinstance(value, Sampled | Constant | Numbers):
        return value
    sizes = method.sizes(index)
    if len(sizes) != 3:
        return value
    if id(value) not in method.samples:
        method.samples[id(value)] = Sampled(value.name, value, sample_logits(sizes[-1]))
    found = method.samples[id(value)]
    assert isinstance(found, Sampled)
    return found


def is_choice(value: Value) -> bool:
    """Whether a value is tokens' weights of experts, of all tokens or of the last ones."""
    return isinstance(value.source if isinstance(value, Last) else value, Route | RouteSparseMixer)


def weights_of(method: Method, index: int) -> Value:
    """A value by its number; one that is made of logits becomes one of the rules that there are."""
    value = method.value(index)
    if isinstance(value, Sampled):
        method.values[index] = value = _rule(value)
    return value


def _rule(value: Sampled) -> Value:
    logits, found = sample_logits(value.array.shape[-1]), value.array
    if found.shape != logits.shape or found.dtype != np.float32:
        return Unknown(value.name, value.kernel, (value.source,))
    chosen = int(np.count_nonzero(found[0, 0]))
    whole = chosen == logits.shape[-1]  # then all shares add up to 1 under both rules
    normalized = value.kernel == "aten::_softmax" if whole else _adds_up(found)
    if _equal(found, _routed(logits, chosen, normalized)):
        return Route(value.name, value.source, chosen, normalized)
    if len(value.bounds) == 1 and _equal(found, _mixed(logits, value.bounds[0])):
        return RouteSparseMixer(value.name, value.source, value.bounds[0] / 2)
    return Unknown(value.name, "a choice of experts by another rule", (value.source,))


def _adds_up(found: Array) -> bool:
    return bool(np.allclose(found.sum(-1), 1, atol=_SAME))


def _equal(found: Array, wanted: Array) -> bool:
    same = np.array_equal(found != 0, wanted != 0)
    return same and bool(np.allclose(found, wanted, rtol=_SAME, atol=_SAME))


def _softmax(values: Array, axis: int = -1) -> Array:
    shares = np.exp(values - values.max(axis, keepdims=True))
    made: Array = shares / shares.sum(axis, keepdims=True)
    return made


def _routed(logits: Array, chosen: int, normalized: bool) -> Array:
    """What ``edgeforge::route`` gives; of equal logits the first are taken."""
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :chosen]
    shares = _softmax(logits)
    kept = np.take_along_axis(shares, order, -1)
    made = np.zeros_like(shares)
    np.put_along_axis(made, order, kept / kept.sum(-1, keepdims=True) if normalized else kept, -1)
    return made


def _mixed(logits: Array, bound: float) -> Array:
    """What ``edgeforge::route_sparse_mixer`` gives, ``bound`` being twice its jitter."""
    left, made = logits.copy(), np.zeros_like(logits)
    for _ in range(2):
        index = left.argmax(-1)[..., None]
        largest = np.take_along_axis(left, index, -1)
        with np.errstate(invalid="ignore"):  # a quotient of zeros is not above the bound
            far = (largest - logits) / np.maximum(np.abs(logits), largest) > bound
        shares = _softmax(np.where(far, -np.inf, left))
        np.put_along_axis(made, index, np.take_along_axis(shares, index, -1), -1)
        np.put_along_axis(left, index, -np.inf, -1)
    return made


def _scattered(values: Array, axis: Array, index: Array, given: Array) -> Array:
    made = values.copy()
    np.put_along_axis(made, index, given.astype(values.dtype), int(axis))
    return made


def _filled(like: Array, value: Array) -> Array:
    return np.full_like(like, value)


_STEPS: Final[Mapping[str, tuple[int, Callable[..., Any]]]] = {
    "aten::argmax": (3, lambda x, axis, keep: np.argmax(x, int(axis), keepdims=bool(keep))),
    "aten::scatter": (4, _scattered),
    "aten::gather": (3, lambda x, axis, index: np.take_along_axis(x, index, int(axis))),
    "aten::eq": (2, np.equal),
    "aten::gt": (2, np.greater),
    "aten::where": (3, np.where),
    "aten::_softmax": (2, lambda x, axis: _softmax(x, int(axis))),
    "aten::abs": (1, np.abs),
    "aten::sub": (3, lambda x, y, alpha: x - np.float32(alpha) * y),
    "aten::maximum": (2, np.maximum),
    "aten::div": (2, np.divide),
    "aten::full_like": (2, _filled),
}
"""By kernel: how many operands it has, and what it makes of them."""
