"""Attention over caches, its mask, and the rotary embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from torch import fx

from exporters.coreml.function import Value
from exporters.coreml.names import UPDATED, cache_name
from exporters.coreml.state import FunctionLowering
from quant.program.calls import AttentionCall
from quant.program.program import node_argument, shape_of

# The largest float16; its negative is added to the score of a token that is not seen.
_HIDDEN: Final = 65504.0
# Sizes of a state that the Neural Engine takes are multiples of this.
ANE_MULTIPLE: Final = 32


def padded(size: int) -> int:
    """The next multiple of `ANE_MULTIPLE`.

    >>> [padded(n) for n in (32, 33)]
    [32, 64]
    """
    return -(-size // ANE_MULTIPLE) * ANE_MULTIPLE


class Attention:
    """What all attentions of a function share, and each of them.

    Args:
        state: the function being lowered.
    """

    def __init__(self, state: FunctionLowering) -> None:
        self.state, self.emitter, self.position = state, state.emitter, state.position
        self.context = state.style.context
        self._updated: list[Value] = []
        self._masks: dict[tuple[int, int], Value] = {}
        self._shared: dict[str, Value] = {}
        self._declare()

    def _declare(self) -> None:
        """States, or inputs, in the order of the layers."""
        style = self.state.style
        self._caches: dict[str, Value] = {}
        for node, given in self.state.program.placeholders("cache"):
            _, heads, _, width = shape_of(node)
            _, _, layer, *_, part = given.name.split(".")
            name = cache_name(int(layer), part)
            shape = (1, heads, self.context, padded(width) if not style.wide else width)
            self._caches[node.name] = (
                self.emitter.state(name, shape)
                if style.states
                else self.emitter.input(name, "fp16", shape)
            )

    def outputs(self) -> None:
        """Gives the caches back where they are no states."""
        for value in self._updated:
            self.emitter.output(value)

    def rope(self, node: fx.Node) -> Value:
        """Rotates the first columns of each head.

        Given::

            %y = edgeforge::rope(%x, %cos, %sin, %position)

        Result: ``%y = x * [cos, cos] + [second, first] * [-sin, sin]`` over the rotated columns,
        with the rows of the tables for these positions.
        """
        emitter, name, x = self.emitter, self.state.name(node), self.state.value(node, 0)
        width = 2 * shape_of(node_argument(node, 1))[1]
        rest: list[Value] = []
        if width < x.shape[-1]:
            sizes = [width, x.shape[-1] - width]
            x, *rest = emitter.split([f"{name}_rotary", f"{name}_rest"], x, sizes)
        halves = emitter.split([f"{name}_first", f"{name}_second"], x, [width // 2] * 2)
        swapped = emitter.concat(f"{name}_swapped", halves[::-1], -1)
        cos, sin = self._rotations()
        straight = emitter.binary("mul", f"{name}_straight", x, cos)
        crossed = emitter.binary("mul", f"{name}_crossed", swapped, sin)
        last = name if not rest else f"{name}_rotated"
        rotated = emitter.binary("add", last, straight, crossed)
        return emitter.concat(name, [rotated, *rest], -1) if rest else rotated

    def emit(self, node: fx.Node) -> Value:
        """Writes a layer's caches and attends over them."""
        emitter, state, name = self.emitter, self.state, self.state.name(node)
        q, k, v = (state.value(node, index) for index in range(3))
        keys = self._write(node, 3, k)
        values = self._write(node, 4, v)
        (_, t, heads, width), kv_heads = q.shape, k.shape[2]
        groups, stored = heads // kv_heads, keys.shape[-1]
        # Query heads that share a key head become rows of one product: no key is copied.
        rows = emitter.reshape(
            f"{name}_rows",
            emitter.heads_first(f"{name}_queries", emitter.pad_last(f"{name}_pad_q", q, stored)),
            (1, kv_heads, -1 if t == -1 else groups * t, stored),
        )
        call = AttentionCall.of(node)
        window, scale = call.window, call.scale
        mask = self._mask(window, groups)
        if state.style.wide and state.style.states and np.isclose(scale, stored**-0.5, rtol=1e-9):
            mixed = emitter.call(
                "scaled_dot_product_attention",
                f"{name}_mixed",
                "fp16",
                rows.shape,
                query=rows,
                key=keys,
                value=values,
                attn_mask=mask,
            )
        else:
            weights = self._scaled_softmax(name, rows, keys, scale, mask)
            mixed = emitter.matmul(f"{name}_mixed", weights, values)
        mixed = emitter.first_columns(f"{name}_unpadded", mixed, width)
        apart = emitter.reshape(f"{name}_heads", mixed, (1, heads, t, width))
        back = emitter.heads_first(f"{name}_tokens", apart)
        return emitter.reshape(name, back, (1, t, heads * width))

    def _scaled_softmax(
        self, name: str, rows: Value, keys: Value, scale: float, mask: Value
    ) -> Value:
        """``softmax(rows @ keys.T * scale + mask)``, whose scores may pass what float16 holds.

        Each row is divided by its largest magnitude m, if that is over 1. Of the scores that it
        gives, the distances from the largest are multiplied by m: none of them is positive, so
        that one that passes float16 means a weight of 0, as it should.
        """
        emitter = self.emitter
        most = emitter.reduce(
            "reduce_max", f"{name}_most", emitter.unary("abs", f"{name}_abs", rows)
        )
        divisor = emitter.binary("maximum", f"{name}_divisor", most, 1.0)
        unit = emitter.binary("real_div", f"{name}_unit", rows, divisor)
        if self.state.style.wide:  # float16 would round the factor
            unit = emitter.cast(f"{name}_wide", unit, "fp32")
        scaled = emitter.binary("mul", f"{name}_scaled", unit, scale)
        small = emitter.cast(f"{name}_small", scaled, "fp16")
        scores = emitter.matmul(f"{name}_scores", small, keys, transpose_y=True)
        seen = emitter.binary("add", f"{name}_seen", scores, mask)
        top = emitter.reduce("reduce_max", f"{name}_top", seen)
        below = emitter.binary("sub", f"{name}_below", seen, top)
        return emitter.softmax(
            f"{name}_weights", emitter.binary("mul", f"{name}_stretched", below, divisor)
        )

    def _write(self, node: fx.Node, index: int, new: Value) -> Value:
        """A cache with the new tokens' rows in it, as attention reads it."""
        emitter, style = self.emitter, self.state.style
        cache = self._caches[node_argument(node, index).name]
        name = f"{cache.name}_new"
        rows = emitter.heads_first(f"{name}_rows", new)
        rows = emitter.pad_last(f"{name}_pad", rows, cache.shape[-1])
        old = cache
        if style.states:
            old = emitter.call("read_state", f"{cache.name}_old", "fp16", cache.shape, input=cache)
        written = name if style.states else cache.name + UPDATED
        if style.one_hot:
            updated = self._write_one_hot(written, old, rows)
        else:
            begin, end = self._bounds()
            free = [True, True, False, True]
            updated = emitter.call(
                "slice_update",
                written,
                "fp16",
                cache.shape,
                x=old,
                update=rows,
                begin=begin,
                end=end,
                begin_mask=free,
                end_mask=free,
            )
        if not style.states:
            self._updated.append(updated)
            return updated
        emitter.call_many("write_state", [], input=cache, data=updated)
        return emitter.call("read_state", f"{cache.name}_now", "fp16", cache.shape, input=cache)

    def _write_one_hot(self, name: str, old: Value, rows: Value) -> Value:
        """Old rows where nothing is written, plus each new row times its one-hot column.

        Exact: of the numbers that are added, all but one are zero.
        """
        emitter, t = self.emitter, self.state.tokens
        hot, kept = self._one_hot()
        stay = emitter.binary("mul", f"{name}_kept", old, kept)
        if t == 1:
            column = self._share(
                "hot_column", lambda n: emitter.reshape(n, hot, (1, 1, self.context, 1))
            )
            come = emitter.binary("mul", f"{name}_placed", rows, column)
        else:
            come = emitter.matmul(f"{name}_placed", hot, rows, transpose_x=True)
        return emitter.binary("add", name, stay, come)

    def _one_hot(self) -> tuple[Value, Value]:
        """``fp16[1, 1, t, c]``, 1 where a token is written, and 1 where nothing is, as a column."""
        emitter, t = self.emitter, self.state.tokens

        def make_hot(name: str) -> Value:
            at = emitter.binary("equal", f"{name}_at", self._keys(), self._queries())
            half = emitter.cast(f"{name}_half", at, "fp16")
            return emitter.reshape(name, half, (1, 1, t, self.context))

        def make_kept(name: str) -> Value:
            hot = self._share("hot", make_hot)
            sums = hot
            if t != 1:
                sums = emitter.call(
                    "reduce_sum",
                    f"{name}_sums",
                    "fp16",
                    (1, 1, 1, self.context),
                    x=hot,
                    axes=[-2],
                    keep_dims=True,
                )
            left = emitter.binary("sub", f"{name}_row", emitter.constant(1.0, "fp16"), sums)
            return emitter.reshape(name, left, (1, 1, self.context, 1))

        return self._share("hot", make_hot), self._share("kept", make_kept)

    def _bounds(self) -> tuple[Value, Value]:
        """Where the new rows lie in a cache, as slices want it."""
        emitter, t = self.emitter, self.state.tokens

        def make_end(name: str) -> Value:
            count = t if t != -1 else self._count()
            return emitter.binary("add", name, self.position, count)

        def make(name: str, at: Value) -> Value:
            none = emitter.constant([0])
            return emitter.concat(name, [none, none, at, none], 0)

        end = self._share("position_after", make_end)
        return (
            self._share("write_begin", lambda name: make(name, self.position)),
            self._share("write_end", lambda name: make(name, end)),
        )

    def _mask(self, window: int, groups: int) -> Value:
        """``fp16[1, 1, groups * t, c]``: 0 where a token is seen, else so low that exp gives 0."""
        emitter, t = self.emitter, self.state.tokens
        if (window, groups) in self._masks:
            return self._masks[window, groups]
        name = f"mask_window_{window}_groups_{groups}"
        if groups > 1:
            made = emitter.call(
                "tile",
                name,
                "fp16",
                (1, 1, -1 if t == -1 else groups * t, self.context),
                x=self._mask(window, 1),
                reps=[1, 1, groups, 1],
            )
        else:
            keys, queries = self._keys(), self._queries()
            seen = emitter.binary("less_equal", f"{name}_past", keys, queries)
            if window:
                edge = emitter.binary("sub", f"{name}_edge", queries, window)
                near = emitter.binary("greater", f"{name}_near", keys, edge)
                seen = emitter.call(
                    "logical_and", f"{name}_both", "bool", seen.shape, x=seen, y=near
                )
            ones = emitter.cast(f"{name}_ones", seen, "fp16")
            lacking = emitter.binary("sub", f"{name}_lacking", ones, 1.0)
            flat = emitter.binary("mul", f"{name}_flat", lacking, _HIDDEN)
            if self.state.style.wide:
                # Scores within attention may be larger than that: past float16 lies infinity.
                flat = emitter.binary("mul", f"{name}_infinite", flat, _HIDDEN)
            made = emitter.reshape(name, flat, (1, 1, t, self.context))
        self._masks[window, groups] = made
        return made

    def _rotations(self) -> tuple[Value, Value]:
        """``[cos, cos]`` and ``[-sin, sin]`` of these positions: two ``fp16[1, t, 1, width]``."""
        emitter = self.emitter

        def make(name: str, sign: float | None) -> Value:
            table = f"rope_{name[:3]}"
            values = self.state.program.tables[table].numpy()
            if not self.state.style.wide:
                values = values.astype(np.float16)
            stored = self.state.bank.table(emitter, table, values)
            rows = emitter.gather_rows(f"{name}_rows", stored, self._positions())
            half = emitter.cast(f"{name}_half", rows, "fp16")
            left = half if sign is None else emitter.binary("mul", f"{name}_negative", half, sign)
            both = emitter.concat(f"{name}_both", [left, half], -1)
            t, width = both.shape
            return emitter.reshape(name, both, (1, t, 1, width))

        return (
            self._share("cos", lambda name: make(name, None)),
            self._share("sin", lambda name: make(name, -1.0)),
        )

    def _count(self) -> Value:
        """The number of tokens, where the caller chooses it: ``int32[]``."""
        emitter = self.emitter

        def make(name: str) -> Value:
            shape = emitter.call("shape", f"{name}_shape", "int32", (2,), x=self.state.ids)
            return emitter.call(
                "gather",
                name,
                "int32",
                (),
                x=shape,
                indices=1,
                axis=0,
                batch_dims=0,
                validate_indices=False,
            )

        return self._share("token_count", make)

    def _positions(self) -> Value:
        """Of these tokens: ``int32[t]``."""

        def make(name: str) -> Value:
            count = self.state.tokens if self.state.tokens != -1 else self._count()
            if count == 1:
                return self.position
            steps = self.emitter.numbers(f"{name}_steps", count)
            return self.emitter.binary("add", name, steps, self.position)

        return self._share("positions", make)

    def _queries(self) -> Value:
        shape = (self.state.tokens, 1)
        return self._share(
            "query_positions", lambda name: self.emitter.reshape(name, self._positions(), shape)
        )

    def _keys(self) -> Value:
        return self._share("key_positions", lambda name: self.emitter.numbers(name, self.context))

    def _share(self, name: str, make: Callable[[str], Value]) -> Value:
        """A value that many attentions use, made where the first asks for it."""
        if name not in self._shared:
            self._shared[name] = make(name)
        return self._shared[name]
