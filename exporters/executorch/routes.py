"""Emits the choice of experts as calls of ExecuTorch's kernels, outside of the delegates.

Its kernel ``topk`` may return any of several equal numbers. So an expert after the other is taken:
``argmax`` returns the first of the largest.
"""

from __future__ import annotations

import math

import numpy as np
from torch import fx

from exporters.executorch.state import MethodLowering
from quant.program.calls import RouteCall, SparseMixerCall
from quant.program.program import shape_of


def route(state: MethodLowering, node: fx.Node) -> None:
    """Emits each token's weights: a softmax, and zeros for the experts that it did not choose."""
    call = RouteCall.of(node)
    emit = _Kernels(state, node)
    logits = state.tensors[call.logits]
    left = logits
    for _ in range(call.chosen):
        left = emit.without(left, emit.first_largest(left))
    taken = emit.float_test("eq", left, -math.inf)
    if call.normalized:  # of the chosen ones alone, the shares add up to 1
        state.tensors[node] = emit.softmax(emit.where(taken, logits, emit.number(-math.inf)))
    else:
        state.tensors[node] = emit.where(taken, emit.softmax(logits), emit.number(0.0))


def route_sparse_mixer(state: MethodLowering, node: fx.Node) -> None:
    """Emits each token's weights by SparseMixer's rule; see `quant.program.expert_ops`."""
    call = SparseMixerCall.of(node)
    emit = _Kernels(state, node)
    scores = left = state.tensors[call.logits]
    magnitudes = emit.call("abs", "out", scores)
    made = emit.filled(scores, 0.0)
    for _ in range(2):
        index = emit.first_largest(left)
        largest = emit.column("gather", "out", left, emit.axis, index, emit.no)
        gap = emit.call("sub", "out", largest, scores, emit.integer(1))
        bound = emit.call("maximum", "out", magnitudes, largest)
        far = emit.float_test("gt", emit.call("div", "out", gap, bound), 2 * call.jitter)
        shares = emit.softmax(emit.where(far, emit.number(-math.inf), left))
        share = emit.column("gather", "out", shares, emit.axis, index, emit.no)
        made = emit.call("scatter", "src_out", made, emit.axis, index, share)
        left = emit.without(left, index)
    state.tensors[node] = made


class _Kernels:
    """Emits kernels whose results have the shape of the router's logits, or one column of it.

    Args:
        state: the method.
        node: the call that chooses.
    """

    def __init__(self, state: MethodLowering, node: fx.Node) -> None:
        self.state, self.method = state, state.method
        self.dims, self.dynamic = state.dims(node), state.is_dynamic(node)
        self.axis, self.no = self.integer(len(shape_of(node)) - 1), self.method.boolean(False)

    def integer(self, value: int) -> int:
        return self.method.integer(value)

    def number(self, value: float) -> int:
        """A tensor of one number, which broadcasts."""
        data = np.array([value], np.float32).tobytes()
        return self.state.table(f"number {value!r}", data, [1])

    def call(self, name: str, overload: str, *arguments: int) -> int:
        """A kernel whose result is ``float32[1, t, E]``."""
        out = self.method.tensor("float32", self.dims, dynamic=self.dynamic)
        self.method.call(f"aten::{name}", overload, *arguments, out=out)
        return out

    def column(self, name: str, overload: str, *arguments: int) -> int:
        """A kernel whose result is ``float32[1, t, 1]``."""
        out = self.method.tensor("float32", [*self.dims[:-1], 1], dynamic=self.dynamic)
        self.method.call(f"aten::{name}", overload, *arguments, out=out)
        return out

    def first_largest(self, values: int) -> int:
        """The first expert of the largest value: ``int64[1, t, 1]``."""
        out = self.method.tensor("int64", [*self.dims[:-1], 1], dynamic=self.dynamic)
        keep = self.method.boolean(True)
        self.method.call("aten::argmax", "out", values, self.axis, keep, out=out)
        return out

    def without(self, values: int, index: int) -> int:
        """The values with minus infinity at an expert."""
        infinity = self.method.double(-math.inf)
        return self.call("scatter", "value_out", values, self.axis, index, infinity)

    def float_test(self, name: str, values: int, bound: float) -> int:
        """A comparison with a number: ``bool[1, t, E]``."""
        out = self.method.tensor("bool", self.dims, dynamic=self.dynamic)
        bounds = self.method.double(bound)
        self.method.call(f"aten::{name}", "Scalar_out", values, bounds, out=out)
        return out

    def where(self, condition: int, values: int, others: int) -> int:
        return self.call("where", "self_out", condition, values, others)

    def softmax(self, values: int) -> int:
        return self.call("_softmax", "out", values, self.axis, self.no)

    def filled(self, like: int, value: float) -> int:
        """A tensor of one number everywhere, in the shape of another."""
        number, absent = self.method.double(value), self.method.none()
        return self.call("full_like", "out", like, number, absent)
