"""Emits mixtures of experts: each expert in a block of its own, or all of them for all tokens.

For the GPU an expert is the first block of a ``cond``, with its weights inside, so that an expert
that no token of a call chose is not computed. In the block it computes all tokens of the call: how
many tokens chose it is known to no type. For the Neural Engine, which has no branches, every
expert computes all tokens in every call.

What an expert computes for a token that did not choose it is dropped by ``select``: a product with
a weight of 0 would keep what is infinite or NaN. In a mixture of attention heads that is so twice:
where queries are placed in slots, and where outputs are added up (`exporters.coreml.slots`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import fx

from exporters.coreml.function import Value
from exporters.coreml.slots import Slots
from exporters.coreml.state import FunctionLowering
from quant.program.expert_branches import Branch, Mixture, mixtures
from quant.program.program import shape_of

_SLOTS: Final = "fp16"  # the dtype of queries


@dataclass
class _Group:
    """A group of branches that is being emitted.

    Attributes:
        name: the name of its result.
        mixture: the branches.
        weights: each token's weight of each expert.
        chosen: where it is not zero.
        source: what the experts read; slots stand apart.
        slots: the slots that they fill or read; None where they do neither.
    """

    name: str
    mixture: Mixture
    weights: Value
    chosen: Value
    source: Value
    slots: Slots | None = None


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
        """Emits all experts of a layer, at the call that gathers them.

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

        and for the Neural Engine the sums of the selected products alone. Of ``edgeforge::slots``
        the results are kept in place of added up, ``select(own slot, result_1, r_0)``.
        """
        state, name, mixture = self._state, self._state.name(node), self._mixtures[node]
        weights = state.result(mixture.weights)
        chosen = state.emitter.once(
            ("chosen", weights.name),
            lambda: state.emitter.binary("not_equal", f"{name}_chosen", weights, 0.0),
        )
        group = _Group(name, mixture, weights, chosen, state.result(mixture.source))
        if mixture.fills_slots or mixture.reads_slots:
            group.slots = Slots(state, weights, chosen, *mixture.slots)
            if mixture.reads_slots:
                group.source = group.slots.apart(f"{name}_apart", group.source)
        used = self._used(group) if state.style.wide else None
        total = self._nothing(group) if state.style.wide or mixture.fills_slots else None
        for branch in mixture.branches:
            total = self._gathered(group, branch, used, total)
        assert total is not None
        if mixture.fills_slots:
            assert group.slots is not None
            return group.slots.joined(name, total)
        return total

    def _used(self, group: _Group) -> Value:
        """Which experts a token of the call chose: ``bool[E]``."""
        emitter, name, chosen = self._state.emitter, group.name, group.chosen

        def make() -> Value:
            numbers = emitter.cast_once(f"{chosen.name}_numbers", chosen, group.weights.dtype)
            most = emitter.reduce_tokens("reduce_max", f"{name}_most", numbers)
            return emitter.binary("greater", f"{name}_used", most, 0.0)

        return emitter.once(("used", group.weights.name), make)

    def _nothing(self, group: _Group) -> Value:
        """What is gathered before the first expert: zeros."""
        emitter, name = self._state.emitter, f"{group.name}_zeros"
        width = shape_of(group.mixture.branches[0].result)[-1]
        if group.mixture.fills_slots:
            assert group.slots is not None
            return group.slots.empty(name, width // group.mixture.slots[1], _SLOTS)
        if group.source.shape == (*group.weights.shape[:-1], width):
            return emitter.zeros(name, group.source, group.weights.dtype)
        column = emitter.column(f"{name}_of_one", group.weights, 0)
        zero = emitter.zeros(f"{name}_zero", column, group.weights.dtype)
        return emitter.tile(name, zero, (1, 1, width))

    def _gathered(
        self, group: _Group, branch: Branch, used: Value | None, total: Value | None
    ) -> Value:
        """What is gathered with an expert; where a call may skip one, only if a token chose it."""
        emitter, at = self._state.emitter, f"{group.name}_{branch.expert}"
        if used is None:
            return self._with(group, branch, total)
        before = total
        assert before is not None
        return emitter.cond(
            f"{at}_total",
            emitter.element(f"{at}_used", used, branch.expert),
            lambda: self._with(group, branch, before),
            lambda: emitter.unary("identity", f"{at}_skipped", before),
        )

    def _with(self, group: _Group, branch: Branch, total: Value | None) -> Value:
        """Emits an expert for all tokens, and gathers what counts of it."""
        state, emitter = self._state, self._state.emitter
        at, slots, expert = f"{group.name}_{branch.expert}", group.slots, branch.expert
        own = group.source
        if group.mixture.reads_slots:
            assert slots is not None
            own = slots.read(at, expert, own)
        state.hold(branch.chosen, own)
        for node in branch.nodes:
            self._lower(node)
        result = state.result(branch.result)
        if group.mixture.fills_slots:
            assert slots is not None and total is not None
            return slots.filled(at, expert, emitter.cast(f"{at}_result", result, _SLOTS), total)
        column = emitter.column(f"{at}_weights", group.weights, expert)
        result = emitter.cast(f"{at}_result", result, group.weights.dtype)
        product = emitter.binary("mul", f"{at}_weighed", result, column)
        marks = emitter.column(f"{at}_chosen", group.chosen, expert)
        kept = emitter.select(f"{at}_kept", marks, product, 0.0)
        return kept if total is None else emitter.binary("add", f"{at}_sum", total, kept)
