"""Emits mixtures of experts: each expert in a block of its own, or all of them for all tokens.

For the GPU an expert is the first block of a ``cond``, with its weights inside, so that an expert
that no token of a call chose is not computed. In the block it computes all tokens of the call: how
many tokens chose it is known to no type. For the Neural Engine, which has no branches, every
expert computes all tokens in every call.

What an expert computes for a token that did not choose it is dropped by ``select``: a product with
a weight of 0 would keep what is infinite or NaN.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from exporters.coreml.function import Value
from exporters.coreml.state import FunctionLowering
from quant.program.expert_branches import Branch, Mixture, mixtures


class Mixtures:
    """The mixtures of a function.

    Args:
        state: the state of lowering the function.
        lower: emits one node of a branch.
    """

    def __init__(self, state: FunctionLowering, lower: Callable[[fx.Node], None]) -> None:
        self._state, self._lower = state, lower
        self._mixtures = mixtures(state.program)
        self._owned = {
            node
            for mixture in self._mixtures.values()
            for branch in mixture.branches
            for node in (branch.chosen, *branch.nodes)
        }

    def owns(self, node: fx.Node) -> bool:
        """Whether a node belongs to a branch, which `emit` emits."""
        return node in self._owned

    def emit(self, node: fx.Node) -> Value:
        """Emits all experts of a layer, at the call that adds them up.

        Given::

            %r = edgeforge::combine(%weights, [%result_0, ...])

        Result, for the GPU::

            chosen = weights != 0
            used = reduce_max(chosen, all tokens) > 0
            r_0 = cond(used[0],
                {select(chosen[..., 0], result_0 * weights[..., 0], 0) + zeros},
                {zeros})
            r_1 = cond(used[1], {select(...) + r_0}, {r_0})
            ...

        and for the Neural Engine the sums of the selected products alone.
        """
        state, emitter, name = self._state, self._state.emitter, self._state.name(node)
        mixture = self._mixtures[node]
        weights = state.result(mixture.weights)
        chosen = emitter.binary("not_equal", f"{name}_chosen", weights, 0.0)
        if not state.style.wide:
            total: Value | None = None
            for branch in mixture.branches:
                total = self._added(name, mixture, branch, chosen, total)
            assert total is not None
            return total
        numbers = emitter.cast(f"{name}_chosen_numbers", chosen, weights.dtype)
        most = emitter.reduce_tokens("reduce_max", f"{name}_most", numbers)
        used = emitter.binary("greater", f"{name}_used", most, 0.0)
        total = emitter.filled(f"{name}_zeros", state.result(mixture.source), 0.0, weights.dtype)
        for branch in mixture.branches:
            total = self._if_used(name, mixture, branch, chosen, used, total)
        return total

    def _if_used(
        self, name: str, mixture: Mixture, branch: Branch, chosen: Value, used: Value, total: Value
    ) -> Value:
        """The sum with an expert's results where a token chose it, else without."""
        emitter, at = self._state.emitter, f"{name}_{branch.expert}"
        return emitter.cond(
            f"{at}_total",
            emitter.element(f"{at}_used", used, branch.expert),
            lambda: self._added(name, mixture, branch, chosen, total),
            lambda: emitter.unary("identity", f"{at}_skipped", total),
        )

    def _added(
        self, name: str, mixture: Mixture, branch: Branch, chosen: Value, total: Value | None
    ) -> Value:
        """Emits an expert for all tokens, and adds what counts of it to a sum."""
        state, emitter, at = self._state, self._state.emitter, f"{name}_{branch.expert}"
        state.hold(branch.chosen, state.result(mixture.source))
        for node in branch.nodes:
            self._lower(node)
        weights = state.result(mixture.weights)
        column = emitter.column(f"{at}_weights", weights, branch.expert)
        result = emitter.cast(f"{at}_result", state.result(branch.result), weights.dtype)
        product = emitter.binary("mul", f"{at}_weighed", result, column)
        marks = emitter.column(f"{at}_chosen", chosen, branch.expert)
        kept = emitter.select(f"{at}_kept", marks, product, 0.0)
        return kept if total is None else emitter.binary("add", f"{at}_sum", total, kept)
