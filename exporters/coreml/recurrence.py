"""The recurrence of RWKV, Mamba 2 and the gated delta rule, in float32.

A function of one token writes the step as `quant.program.recurrence_ops.recurrence` defines it. A
function of more tokens has no loop: with ``c[t]`` the sum of the log decays up to token t,

    memory after t = e^c[t] * before + sum over j <= t of e^(c[t] - c[j]) * k[j] v[j]^T

and what token t reads is ``q[t]`` times that. Every exponent is the sum of some log decays, which
are never positive, so nothing overflows; ``e^-c`` alone, which would, is formed nowhere. The sums
are taken over just the tokens between j and t, not as differences of longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import fx

from exporters.coreml.carried import Carried
from exporters.coreml.function import Shape, Value
from exporters.coreml.memory import Memory
from exporters.coreml.positions import Positions
from exporters.coreml.state import FunctionLowering
from exporters.errors import ExportError
from quant.program.calls import RecurrenceCall
from quant.program.program import shape_of

FORGOTTEN: Final = -128.0
"""A log decay of which float32's exponential is 0, as of every lower one. Lower ones, infinite ones
among them, are raised to it: minus infinity times the zeros of a mask would be NaN."""


@dataclass(frozen=True)
class _Operands:
    """A recurrence's operands, float32, with heads before tokens.

    Where a head of queries and keys serves several of the memory, those stand in an axis of their
    own: ``[1, g, 1, t, n]`` and ``[1, g, h / g, t, p]``; else there are ``[1, h, t, n]``.

    Attributes:
        name: the result's name, with which those of all parts begin.
        query: ``[..., t, n]``.
        key: ``[..., t, n]``.
        value: ``[..., t, p]``.
        decay: the log decay, ``[..., t, 1]`` or, of each row of the memory, ``[..., t, n]``.
        bonus: ``[1, h, 1, n]`` or None.
        beta: ``[..., t, 1]`` or None.
        before: the memory before the call, ``[..., n, p]``.
    """

    name: str
    query: Value
    key: Value
    value: Value
    decay: Value
    bonus: Value | None
    beta: Value | None
    before: Value

    @property
    def lead(self) -> Shape:
        """The axes before a memory's rows."""
        return self.before.shape[:-2]

    @property
    def of_rows(self) -> bool:
        """Whether each row of the memory has a decay of its own."""
        return self.decay.shape[-1] > 1


class Recurrences:
    """Emits the recurrences of one function.

    Args:
        state: the function being lowered.
        positions: the positions of its tokens.
        carried: the states.
    """

    def __init__(self, state: FunctionLowering, positions: Positions, carried: Carried) -> None:
        self.state, self.emitter = state, state.emitter
        self.positions, self.memory = positions, Memory(state, positions, carried)

    def emit(self, node: fx.Node) -> Value:
        """Emits a recurrence and the update of its memory.

        Given::

            %y = edgeforge::recurrence(%q, %k, %v, %log_decay, %bonus, %beta, %memory, %position)

        Raises:
            ExportError: rows have decays of their own, and fewer heads of keys than of the memory.
        """
        emitter, name = self.emitter, self.state.name(node)
        heads, _, rows, columns = RecurrenceCall.of(node).shape
        tokens, whole = self.state.tokens, (1, heads, rows, columns)
        before = self.memory.read(node, 6, whole)
        parts = self._operands(node, before)
        out, after = (self._step if tokens == 1 else self._closed)(parts)
        self.memory.write(node, 6, emitter.reshape(f"{name}_after", after, whole))
        apart = emitter.reshape(f"{name}_apart", out, (1, heads, tokens, columns))
        made = emitter.heads_first(f"{name}_tokens", apart)
        return made if self.state.stays_wide(node) else emitter.cast(name, made, "fp16")

    def _operands(self, node: fx.Node, before: Value) -> _Operands:
        emitter, name, call = self.emitter, self.state.name(node), RecurrenceCall.of(node)
        heads, key_heads, rows, columns = call.shape
        each = heads // key_heads
        keys: Shape = (1, heads) if each == 1 else (1, key_heads, 1)
        values: Shape = (1, heads) if each == 1 else (1, key_heads, each)

        def apart(part: str, index: int, lead: Shape, width: int) -> Value:
            x = self._wide(node, index)
            count = heads if lead == values else key_heads
            x = emitter.reshape(f"{name}_{part}_column", x, (1, self.state.tokens, count, width))
            first = emitter.heads_first(f"{name}_{part}_first", x)
            return emitter.reshape(f"{name}_{part}", first, (*lead, self.state.tokens, width))

        decay_shape = shape_of(call.log_decay)
        of_rows = len(decay_shape) != 3
        if of_rows and each != 1:
            raise ExportError(
                f"the recurrence at {node.name} has a decay of each row and {key_heads} heads of "
                f"keys for {heads} of the memory; Core ML's target holds as many of both, or one "
                f"decay a head"
            )
        if call.constant_decay:
            stored = self.state.float_weight(call.log_decay)
            wide = emitter.cast_once(f"{stored.name}_wide", stored, "fp32")
            decay = emitter.reshape(f"{name}_decay_row", wide, (1, heads, 1, rows))
            if self.state.tokens != 1:
                decay = emitter.binary("mul", f"{name}_decay", decay, self._ones())
        else:
            decay = apart("decay", 3, values, rows if of_rows else 1)
        bonus = None
        if call.bonus is not None:
            stored = self.state.float_weight(call.bonus)
            wide = emitter.cast_once(f"{stored.name}_wide", stored, "fp32")
            bonus = emitter.reshape(f"{name}_bonus", wide, (1, heads, 1, rows))
            if each != 1:
                bonus = emitter.reshape(f"{name}_bonus_apart", bonus, (*values, 1, rows))
        return _Operands(
            name,
            apart("query", 0, keys, rows),
            apart("key", 1, keys, rows),
            apart("value", 2, values, columns),
            decay,
            bonus,
            None if call.beta is None else apart("beta", 5, values, 1),
            emitter.reshape(f"{name}_before", before, (*values, rows, columns)),
        )

    def _wide(self, node: fx.Node, index: int) -> Value:
        x = self.state.given(node, index)
        return self.emitter.cast_once(f"{x.name}_as_fp32", x, "fp32")

    def _step(self, given: _Operands) -> tuple[Value, Value]:
        """One token: what it reads, and the memory after it."""
        emitter, name, value = self.emitter, given.name, given.value
        kept = emitter.unary("exp", f"{name}_kept_share", given.decay)
        kept = emitter.reshape(f"{name}_kept_rows", kept, (*kept.shape[:-2], kept.shape[-1], 1))
        held = emitter.binary("mul", f"{name}_held", given.before, kept)
        if given.beta is not None:
            found = emitter.matmul(f"{name}_found", given.key, held)
            new = emitter.binary("sub", f"{name}_new", value, found)
            value = emitter.binary("mul", f"{name}_replacing", new, given.beta)
        added = emitter.matmul(f"{name}_added", given.key, value, transpose_x=True)
        after = emitter.binary("add", f"{name}_memory_now", held, added)
        if given.bonus is None:
            return emitter.matmul(f"{name}_read", given.query, after), after
        read = emitter.matmul(f"{name}_read", given.query, given.before)
        return self._with_own(given, read), after

    def _closed(self, given: _Operands) -> tuple[Value, Value]:
        """All tokens of a call: what they read, and the memory after them."""
        emitter, name = self.emitter, given.name
        decay = emitter.binary("maximum", f"{name}_bounded", given.decay, FORGOTTEN)
        early = given.bonus is not None
        sums = emitter.running_sum(f"{name}_sums", decay, -2, exclusive=early)
        since = emitter.unary("exp", f"{name}_since_start", sums)
        between = emitter.unary("exp", f"{name}_between", self._between(name, given, decay))
        value = given.value
        if given.beta is not None:
            value = self._replacing(given, since, between)
        weights = self._weights(given, "query", given.query, between, strict=early)
        old = emitter.matmul(
            f"{name}_read_old",
            emitter.binary("mul", f"{name}_query_since", given.query, since),
            given.before,
        )
        new = emitter.matmul(f"{name}_read_new", weights, value)
        read = emitter.binary("add", f"{name}_read", old, new)
        out = self._with_own(given, read) if early else read

        rest = emitter.running_sum(f"{name}_rest_sums", decay, -2, exclusive=True, reverse=True)
        left = emitter.unary("exp", f"{name}_until_end", rest)
        keys = emitter.binary("mul", f"{name}_key_until_end", given.key, left)
        added = emitter.matmul(f"{name}_added", keys, value, transpose_x=True)
        all_sums = emitter.call(
            "reduce_sum",
            f"{name}_all_sums",
            "fp32",
            (*decay.shape[:-2], decay.shape[-1]),
            x=decay,
            axes=[-2],
            keep_dims=False,
        )
        share = emitter.unary("exp", f"{name}_kept_share", all_sums)
        share = emitter.reshape(f"{name}_kept_rows", share, (*share.shape, 1))
        held = emitter.binary("mul", f"{name}_held", given.before, share)
        return out, emitter.binary("add", f"{name}_memory_now", held, added)

    def _between(self, name: str, given: _Operands, decay: Value) -> Value:
        """The log decays from each token j to each token t added up, 0 for t before j.

        ``[..., t, j]``; with a decay of each row ``[..., t, j, n]``.
        """
        emitter, early = self.emitter, given.bonus is not None
        if given.of_rows:
            tokens, rows = decay.shape[-2:]
            decay = emitter.reshape(f"{name}_decays", decay, (*given.lead, tokens, 1, rows))
        behind = emitter.binary(
            "mul", f"{name}_behind", decay, self._mask(0, of_rows=given.of_rows)
        )
        axis = -3 if given.of_rows else -2
        return emitter.running_sum(f"{name}_between_sums", behind, axis, exclusive=early)

    def _weights(
        self, given: _Operands, part: str, x: Value, between: Value, *, strict: bool
    ) -> Value:
        """``x[t] . (e^(c[t] - c[j]) * k[j])`` for j up to t or, if strict, before it; else 0."""
        emitter, at = self.emitter, f"{given.name}_{part}"
        if given.of_rows:
            tokens, rows = x.shape[-2:]
            wide = emitter.reshape(f"{at}_rows", x, (*given.lead, tokens, 1, rows))
            keys = emitter.reshape(f"{at}_keys", given.key, (*given.lead, 1, tokens, rows))
            terms = emitter.binary("mul", f"{at}_decayed", between, wide)
            terms = emitter.binary("mul", f"{at}_terms", terms, keys)
            found = emitter.total(f"{at}_products", terms)
        else:
            found = emitter.matmul(f"{at}_scores", x, given.key, transpose_y=True)
            found = emitter.binary("mul", f"{at}_products", found, between)
        mask = self._mask(0 if strict else None)
        return emitter.binary("mul", f"{at}_weights", found, mask)

    def _replacing(self, given: _Operands, since: Value, between: Value) -> Value:
        """What each token adds under the delta rule: ``beta * (v - what its key finds)``.

        What a key finds depends on what the tokens before it added. With A[t, j] =
        ``beta[t] * k[t] . (e^(c[t] - c[j]) * k[j])`` for j before t, the added rows u solve::

            (I + A) u = beta * (v - (e^c * k) before)

        The inverse is made of blocks on the diagonal whose size doubles: of ``[[P, 0], [R, Q]]``
        it is ``[[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]``. The shorter product of (I - A), (I + A^2),
        (I + A^4) and so on is as exact on paper only: where keys repeat, as they do in a text that
        repeats itself, the powers of A grow beyond what float32 can cancel.
        """
        emitter, name, beta = self.emitter, given.name, given.beta
        assert beta is not None
        scores = self._weights(given, "key", given.key, between, strict=True)
        links = emitter.binary("mul", f"{name}_links", scores, beta)
        inverse = self._mask(None, diagonal=True)
        size = 1
        while size < self.state.most_tokens:
            part = emitter.binary("mul", f"{name}_links_{size}", links, self._blocks(size))
            if size > 1:
                part = emitter.matmul(f"{name}_left_{size}", inverse, part)
                part = emitter.matmul(f"{name}_both_{size}", part, inverse)
            inverse = emitter.binary("sub", f"{name}_inverse_{size}", inverse, part)
            size *= 2
        keys = emitter.binary("mul", f"{name}_key_since", given.key, since)
        found = emitter.matmul(f"{name}_found", keys, given.before)
        new = emitter.binary("sub", f"{name}_new", given.value, found)
        wanted = emitter.binary("mul", f"{name}_wanted", new, beta)
        return emitter.matmul(f"{name}_replacing", inverse, wanted)

    def _with_own(self, given: _Operands, read: Value) -> Value:
        """Adds what a token's own key gives it."""
        emitter, name, bonus = self.emitter, given.name, given.bonus
        assert bonus is not None
        product = emitter.binary("mul", f"{name}_bonus_query", given.query, bonus)
        product = emitter.binary("mul", f"{name}_own_terms", product, given.key)
        own = emitter.reduce("reduce_sum", f"{name}_own", product)
        term = emitter.binary("mul", f"{name}_own_value", own, given.value)
        return emitter.binary("add", f"{name}_with_own", read, term)

    def _steps(self) -> Value:
        """The places of a call's tokens within the call, ``int32[t]``."""

        def make(name: str) -> Value:
            count = self.state.tokens if self.state.tokens != -1 else self.positions.count()
            return self.emitter.numbers(name, count)

        return self.positions.share("token_steps", make)

    def _placed(self, shape: Shape) -> Value:
        name = f"token_steps_{'_'.join('t' if size != 1 else '1' for size in shape)}"
        return self.positions.share(
            name, lambda made: self.emitter.reshape(made, self._steps(), shape)
        )

    def _ones(self) -> Value:
        """Ones, ``fp32[t, 1]``."""
        column = self._placed((self.state.tokens, 1))
        return self.positions.share(
            "token_ones", lambda name: self.emitter.filled(name, column, 1.0, "fp32")
        )

    def _mask(
        self, distance: int | None, *, of_rows: bool = False, diagonal: bool = False
    ) -> Value:
        """1 where token t is behind token j, or not before it (None), or is it; 0 elsewhere.

        ``fp32[t, j]``; for decays of rows ``[t, j, 1]``.
        """
        kind = "greater_equal" if distance is None else "greater"
        kind = "equal" if diagonal else kind
        tokens = self.state.tokens
        rows, columns = ((tokens, 1, 1), (1, tokens, 1)) if of_rows else ((tokens, 1), (1, tokens))

        def make(name: str) -> Value:
            made = self.emitter.binary(
                kind, f"{name}_holds", self._placed(rows), self._placed(columns)
            )
            return self.emitter.cast(name, made, "fp32")

        return self.positions.share(f"tokens_{kind}{'_of_rows' * of_rows}", make)

    def _blocks(self, size: int) -> Value:
        """1 where two tokens are in one block of twice a size, and not in one of that size."""
        tokens, emitter = self.state.tokens, self.emitter

        def same(name: str, size: int) -> Value:
            rows, columns = (
                self.positions.share(
                    f"token_{side}_by_{size}",
                    lambda made, shape=shape: emitter.binary(  # type: ignore[misc]
                        "floor_div", made, self._placed(shape), size
                    ),
                )
                for side, shape in (("rows", (tokens, 1)), ("columns", (1, tokens)))
            )
            return emitter.binary("equal", name, rows, columns)

        def make(name: str) -> Value:
            outer, inner = same(f"{name}_outer", 2 * size), same(f"{name}_inner", size)
            apart = emitter.unary("logical_not", f"{name}_apart", inner)
            both = emitter.binary("logical_and", f"{name}_both", outer, apart)
            return emitter.cast(name, both, "fp32")

        return self.positions.share(f"token_blocks_{size}", make)
