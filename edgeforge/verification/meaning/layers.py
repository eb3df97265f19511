"""Holds the layers of a recognised decoder against the checkpoint's spec."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from edgeforge.families.assembly import EMBEDDING, FINAL_NORM, HEAD, NORM_MATRIX
from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning.decoder import Decoder, Layer, Projected
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.rotary import Rotary
from exporters.lifted import Array, Cache, EntryPoint, Norm, Probe, StoredWeight

# float16 keeps 11 bits, and some norms hold the root of epsilon.
_EPSILON_SLACK: Final = 4e-3


class Layers:
    """Compares every layer of an entry point.

    Args:
        spec: the spec of the program, which may be a rotated one.
        context: the declared context, tokens.
        multiple: what caches' lengths are rounded up to a multiple of.
        rotary: what the rotary tables must hold.
        findings: takes what is found.
    """

    def __init__(
        self, spec: ModelSpec, context: int, multiple: int, rotary: Rotary, findings: Findings
    ) -> None:
        self.spec, self.context, self.rotary, self.findings = spec, context, rotary, findings
        self.window = spec.window if spec.window < context else 0
        self.length = -(-context // multiple) * multiple
        self._seen: dict[tuple[int, ...], str] = {}
        self._kept: list[Array] = []
        self._open()

    def _open(self) -> None:
        spec, fact = self.spec, self.findings.fact
        window = f"a window of {self.window} tokens" if self.window else "no window"
        fact("layers", f"there are {len(spec.layers)} layers", len(spec.layers))
        self.rotary.open(self.findings)
        fact("window", f"attention has {window}", self.window)
        fact("context", f"caches and tables are made for {self.context} tokens", self.context)
        fact("positions", "tokens are rotated and cached at their own positions")
        fact("ties", f"the head is {'' if spec.tied else 'not '}the embedding")
        fact("norm_eps", f"every norm's epsilon is {spec.norm_eps:g}", spec.norm_eps)
        fact("norms", "every norm is there, and no other")
        fact("gate", "SiLU is applied to the gate, which up is multiplied with")
        fact("caches", "every layer reads and writes its own caches")
        fact("attention", "heads, their columns and the scale of scores are the checkpoint's")
        fact("weights", "every operation reads its own layer's weight")

    def hold(self, entry: EntryPoint, decoder: Decoder) -> None:
        """Compares an entry point."""
        spec, same, name = self.spec, self.findings.same, entry.name
        count = len(decoder.layers)
        if not same(
            "layers",
            count == len(spec.layers),
            name,
            f"{name} has {count} layers, not {len(spec.layers)}",
        ):
            self.findings.number("layers", count)
            return
        self._weight(name, decoder.embedding.weight, EMBEDDING)
        wanted = EMBEDDING if spec.tied else HEAD
        found = decoder.head.weight.name
        same("ties", found == wanted, name, f"{name}: the head reads {found}, not {wanted}")
        self._norm(f"{name}: the last norm", decoder.final_norm, FINAL_NORM)
        matrix = decoder.norm_matrix
        stands = matrix is not None
        same(
            "norms",
            stands == spec.norm_matrix,
            name,
            f"{name} has {'a' if stands else 'no'} matrix between the last norm and the head",
        )
        if matrix is not None:
            self._weight(name, matrix.weight, NORM_MATRIX)
        for index, (layer, wanted_layer) in enumerate(
            zip(decoder.layers, spec.layers, strict=True)
        ):
            self._layer(entry, index, layer, wanted_layer)
        self._distinct(entry, decoder)

    def _layer(self, entry: EntryPoint, index: int, layer: Layer, wanted: LayerSpec) -> None:
        at, place = f"model.layers.{index}.", f"{entry.name}, layer {index}"
        for part, product in (
            ("self_attn.qk_proj", layer.qk),
            ("self_attn.v_proj", layer.v),
            ("self_attn.o_proj", layer.o),
            ("mlp.gate_up_proj", layer.gate_up),
            ("mlp.down_proj", layer.down),
        ):
            self._weight(place, product.weight, f"{at}{part}.weight")
        self._norm(f"{place}: input_layernorm", layer.input_norm, f"{at}input_layernorm.weight")
        self._norm(
            f"{place}: post_attention_layernorm",
            layer.post_norm,
            f"{at}post_attention_layernorm.weight",
        )
        for part, projected in (("q", layer.query), ("k", layer.key)):
            norm = f"{at}self_attn.{part}_norm.weight" if self.spec.qk_norm else None
            self._norm(f"{place}: {part}_norm", projected.norm, norm)
        self._gate(place, layer, wanted)
        self._attention(entry, place, layer, wanted)
        for part, projected in (("queries", layer.query), ("keys", layer.key)):
            self._rope(entry, f"{place}, {part}", projected)
        for kind, cache in (("key", layer.attention.keys), ("value", layer.attention.values)):
            self._cache(entry, place, index, kind, cache)

    def _weight(self, place: str, found: StoredWeight, wanted: str) -> None:
        self.findings.same(
            "weights",
            found.name == wanted,
            place,
            f"{place} reads {found.name} where it must read {wanted}",
        )

    def _norm(self, place: str, norm: Norm | None, wanted: str | None) -> None:
        same = self.findings.same
        if norm is None or wanted is None:
            missing = "is missing" if norm is None else "stands where the checkpoint has none"
            same("norms", norm is None and wanted is None, place, f"{place} {missing}")
            return
        name = norm.weight.name
        same("norms", name == wanted, place, f"{place} has the weight {name}, not {wanted}")
        eps = self.spec.norm_eps
        near = math.isclose(norm.epsilon, eps, rel_tol=_EPSILON_SLACK)
        if not same("norm_eps", near, place, f"{place} adds {norm.epsilon:.3g}, not {eps:g}"):
            self.findings.number("norm_eps", norm.epsilon)

    def _gate(self, place: str, layer: Layer, wanted: LayerSpec) -> None:
        width = wanted.ffn_width
        gate, up = (layer.gate.start, layer.gate.stop), (layer.up.start, layer.up.stop)
        swapped = (gate, up) == ((width, 2 * width), (0, width))
        words = (
            "SiLU is applied to up, and gate is multiplied with it"
            if swapped
            else (
                f"SiLU is applied to columns {gate} and multiplied with {up}, "
                f"not {(0, width)} and {(width, 2 * width)}"
            )
        )
        good = (gate, up) == ((0, width), (width, 2 * width))
        self.findings.same("gate", good, place, f"{place}: {words}")

    def _attention(self, entry: EntryPoint, place: str, layer: Layer, wanted: LayerSpec) -> None:
        same, attention = self.findings.same, layer.attention
        heads = wanted.num_heads, wanted.num_kv_heads, self.spec.head_dim
        same(
            "attention",
            attention.heads == heads,
            place,
            f"{place} has heads, key heads and columns of {attention.heads}, not {heads}",
        )
        scale = self.spec.head_dim**-0.5
        same(
            "attention",
            math.isclose(attention.scale, scale, rel_tol=1e-3),
            place,
            f"{place} multiplies scores by {attention.scale:.6g}, not {scale:.6g}",
        )
        columns = layer.query.columns, layer.key.columns
        split = wanted.num_heads * self.spec.head_dim
        end = split + wanted.num_kv_heads * self.spec.head_dim
        same(
            "attention",
            [(each.start, each.stop) for each in columns] == [(0, split), (split, end)],
            place,
            f"{place} takes queries and keys from other columns than 0, {split} and {end}",
        )
        words = self._visible(entry, attention.visible)
        same("window", not words, place, f"{place} {words}")

    def _visible(self, entry: EntryPoint, arrays: tuple[Array, ...]) -> str:
        """What is wrong about which tokens are seen, in words; empty where nothing is."""
        key = tuple(map(id, arrays))
        if key not in self._seen:  # layers share a mask; the arrays are kept with their ids
            self._kept.extend(arrays)
            self._seen[key] = self._seen_words(entry, arrays)
        return self._seen[key]

    def _seen_words(self, entry: EntryPoint, arrays: tuple[Array, ...]) -> str:
        wrong: tuple[Probe, Array] | None = None
        widest, never_cut = 0, True
        for probe, seen in zip(entry.probes, arrays, strict=True):
            if not np.array_equal(seen, _causal(probe, self.window, seen.shape[-1])):
                wrong = wrong or (probe, seen)
            counts = seen.sum(1)
            widest = max(widest, int(counts.max(initial=0)))
            never_cut &= bool((counts >= np.arange(probe.count) + probe.start + 1).all())
        if wrong is None:
            return ""
        own = f"a window of {self.window} tokens" if self.window else "no window"
        found = 0 if never_cut else widest
        pairs = zip(entry.probes, arrays, strict=True)
        if all(np.array_equal(seen, _causal(p, found, seen.shape[-1])) for p, seen in pairs):
            self.findings.number("window", found)
            other = f"a window of {found} tokens" if found else "no window"
            return f"has {other}, not {own}"
        probe, seen = wrong
        row = int(np.flatnonzero((seen != _causal(probe, self.window, seen.shape[-1])).any(1))[0])
        return f"lets the token at position {probe.start + row} see others than it must ({own})"

    def _rope(self, entry: EntryPoint, place: str, projected: Projected) -> None:
        rope, same = projected.rope, self.findings.same
        if not same("rope_type", rope is not None, place, f"{place} are not rotated"):
            return
        assert rope is not None
        self.rotary.hold(rope.cos, rope.sin, entry.name, self.findings)
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

    def _distinct(self, entry: EntryPoint, decoder: Decoder) -> None:
        """No two layers may share a cache."""
        names = [
            cache.read
            for layer in decoder.layers
            for cache in (layer.attention.keys, layer.attention.values)
        ]
        shared = sorted({name for name in names if names.count(name) > 1})
        self.findings.same(
            "caches",
            not shared,
            entry.name,
            f"{entry.name}: several layers share the caches {', '.join(shared)}",
        )


def _causal(probe: Probe, window: int, tokens: int) -> Array:
    """Which of ``tokens`` a call's tokens must see: ``bool[count, tokens]``."""
    own = np.arange(probe.start, probe.start + probe.count)[:, None]
    keys = np.arange(tokens)[None]
    seen = keys <= own
    return seen & (keys > own - window) if window else seen
