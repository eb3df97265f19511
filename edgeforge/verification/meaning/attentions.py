"""Holds attentions against the checkpoint's spec: projections, rotations, heads and caches."""

from __future__ import annotations

import math

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.attending import Attending
from edgeforge.verification.meaning.chains import Chain
from edgeforge.verification.meaning.choosing import Choosing
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.head_experts import HeadExperts
from edgeforge.verification.meaning.head_mixture import HeadMixture
from edgeforge.verification.meaning.rotary import Rotary
from edgeforge.verification.meaning.steps import Steps
from edgeforge.verification.meaning.visible import Visible
from exporters.lifted import Attention, Cache, EntryPoint, Linear, Rope, StoredWeight


class Attentions:
    """Compares the attention of one layer after another.

    Args:
        spec: the spec of the program.
        context: the declared context, tokens.
        length: of the caches, tokens.
        rotary: what the rotary tables must hold.
        steps: compares what stands between products.
        choosing: compares the routers of experts.
        findings: takes what is found.
    """

    def __init__(
        self,
        spec: ModelSpec,
        context: int,
        length: int,
        rotary: Rotary,
        steps: Steps,
        choosing: Choosing,
        findings: Findings,
    ) -> None:
        self.spec, self.context, self.length, self.rotary = spec, context, length, rotary
        self.steps, self.choosing, self.findings = steps, choosing, findings
        self.visible = Visible(spec, context, findings)
        self.experts = HeadExperts(spec, steps, choosing, findings)

    def open(self) -> None:
        """Opens the facts that `hold` looks at, beside those of `Visible`."""
        spec, fact = self.spec, self.findings.fact
        fact("attention", "heads, their columns and the scale of scores are the checkpoint's")
        cap = spec.attention_softcap
        fact("attention_softcap", f"the softcap of attention's scores is {cap:g}", cap)
        gated = any(name.endswith(".self_attn.gate_proj.weight") for name in spec.weights)
        words = "is multiplied by the sigmoid of a product" if gated else "has no gate"
        fact("attention_gate", f"attention's result {words}")
        self.experts.open()

    def hold(
        self, entry: EntryPoint, index: int, part: Attending | HeadMixture, wanted: LayerSpec
    ) -> None:
        """Compares a layer's attention.

        Args:
            entry: the entry point.
            index: the layer's number, counted from 0.
            part: its attention.
            wanted: its dimensions.
        """
        at, place = f"model.layers.{index}.", f"{entry.name}, layer {index}"
        found = len(part.queries) if isinstance(part, HeadMixture) else 0
        of_heads = f"{place}, attention"
        if not self.choosing.count(of_heads, found, wanted.attention_experts):
            return
        if isinstance(part, HeadMixture):
            self.experts.hold(of_heads, f"{at}self_attn.", part, wanted)
            products = [("k_proj", part.k), ("v_proj", part.v)]
        else:
            self._gated(place, at, part)
            products = [("qk_proj", part.qk), ("v_proj", part.v), ("o_proj", part.out)]
        for name, product in products:
            self._weight(place, product.weight, f"{at}self_attn.{name}.weight")
        for name, what, made in (
            ("q", "queries", part.query),
            ("k", "keys", part.key),
            ("v", "values", part.value),
        ):
            steps = expected.projected(self.spec, wanted, at, name)
            self.steps.hold(place, what, made, steps)
            self._rope(entry, index, what, made, steps)
        self._columns(place, part, wanted)
        self._attention(entry, place, part.attention, wanted)
        for kind, cache in (("key", part.attention.keys), ("value", part.attention.values)):
            self._cache(entry, place, index, kind, cache)

    def _attention(
        self, entry: EntryPoint, place: str, attention: Attention, wanted: LayerSpec
    ) -> None:
        spec, same = self.spec, self.findings.same
        heads = wanted.num_heads, wanted.num_kv_heads, spec.head_dim
        same(
            "attention",
            attention.heads == heads,
            place,
            f"{place} has heads, key heads and columns of {attention.heads}, not {heads}",
        )
        same(
            "attention",
            math.isclose(attention.scale, spec.scale, rel_tol=1e-3),
            place,
            f"{place} multiplies scores by {attention.scale:.6g}, not {spec.scale:.6g}",
        )
        if spec.attention_softcap or attention.softcap:
            cap, own = attention.softcap, spec.attention_softcap
            words = f"{place} bounds scores by {cap:g}, not by {own:g}"
            near = math.isclose(cap, own, rel_tol=1e-3)
            if not same("attention_softcap", near, place, words):
                self.findings.number("attention_softcap", cap)
        self.visible.hold(entry, place, attention.visible, wanted)

    def _columns(self, place: str, part: Attending | HeadMixture, wanted: LayerSpec) -> None:
        """Compares which columns of their products queries, keys and values are."""
        spec, same = self.spec, self.findings.same
        if isinstance(part, HeadMixture):
            made = (("queries", part.query), ("keys", part.key))
            for what, each in made:
                words = f"{place} takes some columns of the {what} alone"
                same("attention", each.columns is None, place, words)
        else:
            split = wanted.num_heads * spec.head_dim
            end = split + wanted.num_kv_heads * spec.head_dim
            found = [part.query.span("queries"), part.key.span("keys")]
            words = f"{place} takes queries and keys from other columns than 0, {split} and {end}"
            same("attention", found == [(0, split), (split, end)], place, words)
        whole = part.value.columns is None
        same("attention", whole, place, f"{place} takes some columns of the values alone")

    def _weight(self, place: str, found: StoredWeight, wanted: str) -> None:
        words = f"{place} reads {found.name} where it must read {wanted}"
        self.findings.same("weights", found.name == wanted, place, words)

    def _gated(self, place: str, at: str, part: Attending) -> None:
        """Compares the gate of attention's result."""
        named = f"{at}self_attn.gate_proj"
        wants, made = f"{named}.weight" in self.spec.weights, part.gate
        words = "has a gate" if made is not None else "has no gate"
        words = f"{place}: attention's result {words}, unlike the checkpoint's"
        if not self.findings.same("attention_gate", wants == (made is not None), place, words):
            return
        if made is not None:
            product = made.the(Linear, "the gate of attention's result")
            self._weight(place, product.weight, f"{named}.weight")
            self.steps.hold(place, "the gate", made, expected.biased(self.spec, named))
            whole = made.columns is None
            words = f"{place}: the gate of attention's result is some columns of its product"
            self.findings.same("attention_gate", whole, place, words)

    def _rope(
        self, entry: EntryPoint, index: int, what: str, made: Chain, steps: expected.Expected
    ) -> None:
        """Compares the rotation of queries, keys or values, which have one or none."""
        same, place = self.findings.same, f"{entry.name}, layer {index}, {what}"
        found = [step for step in made.steps if isinstance(step, Rope)]
        wanted = [step.index for step in steps if isinstance(step, expected.WantedRope)]
        if not (found or wanted):
            return
        words = "are not rotated" if not found else "are rotated, which the checkpoint does not do"
        if len(found) > 1 and wanted:
            words = "are rotated more than once"
        if not same("rope_type", len(found) == len(wanted), place, f"{place} {words}"):
            return
        (rope,), (number,) = found, wanted
        # The rotation comes last: what stands after it would work on rotated columns.
        last = made.steps[0] is rope
        same("rope_type", last, place, f"{place} are changed again after they were rotated")
        several = len(self.spec.ropes) > 1
        where = f"{entry.name}, layer {index}" if several else entry.name
        self.rotary.hold(number, rope.cos, rope.sin, where, self.findings)
        rows = len(rope.cos)
        same(
            "context",
            rows == self.context,
            entry.name,
            f"{entry.name} has rotary tables for {rows} tokens, not {self.context}",
        )
        self._rows(entry, f"{place} are rotated", rope.rows)

    def _cache(self, entry: EntryPoint, place: str, index: int, kind: str, cache: Cache) -> None:
        same = self.findings.same
        same(
            "caches",
            cache.read == cache.written,
            place,
            f"{place} writes new {kind}s to {cache.written} and reads {cache.read}",
        )
        named = f"{index}.{kind}"
        own = "." not in cache.read or cache.read == named  # where caches have no names
        same("caches", own, place, f"{place} reads {cache.read} as its {named}")
        if cache.length is not None:
            same(
                "context",
                cache.length == self.length,
                place,
                f"{place} has a cache of {cache.length} tokens, not {self.length}",
            )
        self._rows(entry, f"{place}: new {kind}s are cached", cache.rows)

    def _rows(self, entry: EntryPoint, what: str, rows: tuple[tuple[int, ...], ...]) -> None:
        for probe, found in zip(entry.probes, rows, strict=True):
            wanted = tuple(range(probe.start, probe.start + probe.count))
            first = found[0] if found else "nowhere"
            self.findings.same(
                "positions",
                found == wanted,
                what,
                f"{what} from position {first} on where {probe.start} tokens come before",
            )
