"""Attention over caches, and its mask."""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import fx

from exporters.coreml.carried import Carried
from exporters.coreml.function import Value
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering
from quant.program.calls import AttentionCall

# The largest float16; its negative is added to the score of a token that is not visible.
_HIDDEN: Final = 65504.0


class Attention:
    """Emits the attentions of one function, and the masks that they share.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens.
        carried: the caches.
    """

    def __init__(self, state: FunctionLowering, positions: Positions, carried: Carried) -> None:
        self.state, self.emitter, self.position = state, state.emitter, state.position
        self.positions, self.carried = positions, carried
        self.context = state.style.context
        self._masks: dict[tuple[int, int], Value] = {}

    def emit(self, node: fx.Node) -> Value:
        """Emits a layer's writes to its caches and its attention over them."""
        emitter, state, name = self.emitter, self.state, self.state.name(node)
        q, k, v = (state.value(node, index) for index in range(3))
        keys = self._write(node, 3, k)
        values = self._write(node, 4, v)
        (_, t, heads, width), kv_heads = q.shape, k.shape[2]
        groups, stored = heads // kv_heads, keys.shape[-1]
        # Query heads that share a key head become rows of one product, so that no key is copied.
        rows = emitter.reshape(
            f"{name}_rows",
            emitter.heads_first(f"{name}_queries", emitter.pad_last(f"{name}_pad_q", q, stored)),
            (1, kv_heads, -1 if t == -1 else groups * t, stored),
        )
        call = AttentionCall.of(node)
        mask = self._mask(call.window, groups)
        usual = not call.softcap and np.isclose(call.scale, stored**-0.5, rtol=1e-9)
        if usual and state.style.wide and state.style.states:
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
            softmax = self._capped_softmax if call.softcap else self._scaled_softmax
            weights = softmax(name, rows, keys, call, mask)
            mixed = emitter.matmul(f"{name}_mixed", weights, values)
        mixed = emitter.first_columns(f"{name}_unpadded", mixed, width)
        apart = emitter.reshape(f"{name}_heads", mixed, (1, heads, t, width))
        back = emitter.heads_first(f"{name}_tokens", apart)
        return emitter.reshape(name, back, (1, t, heads * width))

    def _scaled_softmax(
        self, name: str, rows: Value, keys: Value, call: AttentionCall, mask: Value
    ) -> Value:
        """``softmax(rows @ keys.T * scale + mask)``, safe for scores that exceed float16.

        Each row is divided by its largest magnitude m before the product, if m is over 1. Then the
        row's largest score is subtracted from its scores, and the differences are multiplied by m.
        No difference is positive, so one that overflows float16 becomes minus infinity, and its
        weight becomes 0, which is the right value.
        """
        emitter = self.emitter
        scores, divisor = self._small_scores(name, rows, keys, call.scale)
        seen = emitter.binary("add", f"{name}_seen", scores, mask)
        top = emitter.reduce("reduce_max", f"{name}_top", seen)
        below = emitter.binary("sub", f"{name}_below", seen, top)
        return emitter.softmax(
            f"{name}_weights", emitter.binary("mul", f"{name}_stretched", below, divisor)
        )

    def _capped_softmax(
        self, name: str, rows: Value, keys: Value, call: AttentionCall, mask: Value
    ) -> Value:
        """``softmax(cap * tanh(rows @ keys.T * scale / cap) + mask)``, for any size of scores.

        Each row is divided by its largest magnitude m before the product, if m is over 1, and the
        scores are multiplied by m / cap. One that overflows float16 becomes infinite, and its
        hyperbolic tangent 1, which is the right value. For the GPU the tangent and what is left
        of it below the row's largest are float32: between 1 and 1/2, float16 has 1024 numbers,
        too few for weights of which each is an exponential of 50 times one.
        """
        emitter = self.emitter
        scores, divisor = self._small_scores(name, rows, keys, call.scale)
        if self.state.style.wide:
            scores = emitter.cast(f"{name}_wide_scores", scores, "fp32")
            divisor = emitter.cast(f"{name}_wide_divisor", divisor, "fp32")
            mask = emitter.cast_once(f"{mask.name}_wide", mask, "fp32")
        factor = emitter.binary("real_div", f"{name}_factor", divisor, call.softcap)
        bent = emitter.unary(
            "tanh", f"{name}_bent", emitter.binary("mul", f"{name}_stretched", scores, factor)
        )
        capped = emitter.binary("mul", f"{name}_capped", bent, call.softcap)
        seen = emitter.binary("add", f"{name}_seen", capped, mask)
        top = emitter.reduce("reduce_max", f"{name}_top", seen)
        below = emitter.binary("sub", f"{name}_below", seen, top)
        return emitter.softmax(
            f"{name}_weights", emitter.cast(f"{name}_differences", below, "fp16")
        )

    def _small_scores(
        self, name: str, rows: Value, keys: Value, scale: float
    ) -> tuple[Value, Value]:
        """``rows / m @ keys.T * scale`` and m, each row's largest magnitude or 1."""
        emitter = self.emitter
        most = emitter.reduce(
            "reduce_max", f"{name}_most", emitter.unary("abs", f"{name}_abs", rows)
        )
        divisor = emitter.binary("maximum", f"{name}_divisor", most, 1.0)
        unit = emitter.binary("real_div", f"{name}_unit", rows, divisor)
        if self.state.style.wide:  # float16 would round the scale
            unit = emitter.cast(f"{name}_wide", unit, "fp32")
        scaled = emitter.binary("mul", f"{name}_scaled", unit, scale)
        small = emitter.cast(f"{name}_small", scaled, "fp16")
        return emitter.matmul(f"{name}_scores", small, keys, transpose_y=True), divisor

    def _write(self, node: fx.Node, index: int, new: Value) -> Value:
        """Writes the new tokens' rows into a cache and returns the cache as attention reads it."""
        emitter, style = self.emitter, self.state.style
        cache = self.carried.held(node, index)
        name = f"{cache.name}_new"
        rows = emitter.heads_first(f"{name}_rows", new)
        rows = emitter.pad_last(f"{name}_pad", rows, cache.shape[-1])
        old = self.carried.read(cache)
        written = self.carried.written_name(cache)
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
        self.carried.write(cache, updated)
        return self.carried.now(cache, updated)

    def _write_one_hot(self, name: str, old: Value, rows: Value) -> Value:
        """Keeps the old rows where nothing is written and adds each new row by a one-hot product.

        The sums are exact, because all of their terms except one are zero.
        """
        emitter, t = self.emitter, self.state.tokens
        hot, kept = self._one_hot()
        stay = emitter.binary("mul", f"{name}_kept", old, kept)
        if t == 1:
            column = self.positions.share(
                "hot_column", lambda n: emitter.reshape(n, hot, (1, 1, self.context, 1))
            )
            come = emitter.binary("mul", f"{name}_placed", rows, column)
        else:
            come = emitter.matmul(f"{name}_placed", hot, rows, transpose_x=True)
        return emitter.binary("add", name, stay, come)

    def _one_hot(self) -> tuple[Value, Value]:
        """Where tokens are written and where not, as zeros and ones.

        Returns:
            ``fp16[1, 1, t, c]``, 1 where a token is written, and ``fp16[1, 1, c, 1]``, 1 where no
            token is written; c is the length of the caches.
        """
        emitter, t = self.emitter, self.state.tokens

        def make_hot(name: str) -> Value:
            at = emitter.binary(
                "equal", f"{name}_at", self.positions.keys(), self.positions.queries()
            )
            half = emitter.cast(f"{name}_half", at, "fp16")
            return emitter.reshape(name, half, (1, 1, t, self.context))

        def make_kept(name: str) -> Value:
            hot = self.positions.share("hot", make_hot)
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

        return self.positions.share("hot", make_hot), self.positions.share("kept", make_kept)

    def _bounds(self) -> tuple[Value, Value]:
        """The begin and the end of the new rows in a cache, as ``slice_update`` takes them."""
        emitter, t = self.emitter, self.state.tokens

        def make_end(name: str) -> Value:
            count = t if t != -1 else self.positions.count()
            return emitter.binary("add", name, self.position, count)

        def make(name: str, at: Value) -> Value:
            none = emitter.constant([0])
            return emitter.concat(name, [none, none, at, none], 0)

        end = self.positions.share("position_after", make_end)
        return (
            self.positions.share("write_begin", lambda name: make(name, self.position)),
            self.positions.share("write_end", lambda name: make(name, end)),
        )

    def _mask(self, window: int, groups: int) -> Value:
        """``fp16[1, 1, groups * t, c]``: 0 for a visible token, else so low that exp gives 0."""
        emitter, t = self.emitter, self.state.tokens
        if (window, groups) in self._masks:
            return self._masks[window, groups]
        name = f"mask_window_{window}_groups_{groups}"
        if groups > 1:
            made = emitter.tile(name, self._mask(window, 1), (1, 1, groups, 1))
        else:
            keys, queries = self.positions.keys(), self.positions.queries()
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
                # Attention may compute scores beyond float16; the second product overflows to
                # minus infinity, which is below all of them.
                flat = emitter.binary("mul", f"{name}_infinite", flat, _HIDDEN)
            made = emitter.reshape(name, flat, (1, 1, t, self.context))
        self._masks[window, groups] = made
        return made
