"""Holds which tokens each token sees against the windows of the checkpoint's layers."""

from __future__ import annotations

import numpy as np

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning.findings import Findings
from exporters.lifted import Array, EntryPoint, Probe


class Visible:
    """Compares the tokens that attentions see.

    Args:
        spec: the spec of the program.
        context: the declared context, tokens.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, context: int, findings: Findings) -> None:
        self.spec, self.context, self.findings = spec, context, findings
        self._seen: dict[tuple[int, ...], str] = {}
        self._kept: list[Array] = []

    def open(self) -> None:
        """Opens the fact that `hold` looks at."""
        windows = [self._window(each) for each in self.spec.layers if each.num_heads]
        if len(set(windows)) > 1:
            self.findings.fact("window", "every layer's window is the checkpoint's")
        elif windows:
            self.findings.fact("window", f"attention has {_words(windows[0])}", windows[0])
        else:
            self.findings.fact("window", "there is no attention")

    def hold(
        self, entry: EntryPoint, place: str, arrays: tuple[Array, ...], layer: LayerSpec
    ) -> None:
        """Compares a layer.

        Args:
            entry: the entry point.
            place: the layer, in words.
            arrays: for each probe, which tokens each new token sees: ``bool[count, tokens]``.
            layer: the layer's dimensions.
        """
        window = self._window(layer)
        key = (window, *map(id, arrays))
        if key not in self._seen:  # layers share a mask; the arrays are kept with their ids
            self._kept.extend(arrays)
            self._seen[key] = self._seen_words(entry, arrays, window)
        words = self._seen[key]
        self.findings.same("window", not words, place, f"{place} {words}")

    def _window(self, layer: LayerSpec) -> int:
        """A layer's window in the program: one as wide as the context is none."""
        return layer.window if layer.window < self.context else 0

    def _seen_words(self, entry: EntryPoint, arrays: tuple[Array, ...], window: int) -> str:
        """What is wrong about which tokens are seen, in words; empty where nothing is."""
        wrong: tuple[Probe, Array] | None = None
        widest, never_cut = 0, True
        for probe, seen in zip(entry.probes, arrays, strict=True):
            if not np.array_equal(seen, _causal(probe, window, seen.shape[-1])):
                wrong = wrong or (probe, seen)
            counts = seen.sum(1)
            widest = max(widest, int(counts.max(initial=0)))
            never_cut &= bool((counts >= np.arange(probe.count) + probe.start + 1).all())
        if wrong is None:
            return ""
        own = _words(window)
        found = 0 if never_cut else widest
        pairs = zip(entry.probes, arrays, strict=True)
        if all(np.array_equal(seen, _causal(p, found, seen.shape[-1])) for p, seen in pairs):
            self.findings.number("window", found)
            return f"has {_words(found)}, not {own}"
        probe, seen = wrong
        row = int(np.flatnonzero((seen != _causal(probe, window, seen.shape[-1])).any(1))[0])
        return f"lets the token at position {probe.start + row} see others than it must ({own})"


def _words(window: int) -> str:
    return f"a window of {window} tokens" if window else "no window"


def _causal(probe: Probe, window: int, tokens: int) -> Array:
    """Which of ``tokens`` a call's tokens must see: ``bool[count, tokens]``."""
    own = np.arange(probe.start, probe.start + probe.count)[:, None]
    keys = np.arange(tokens)[None]
    seen = keys <= own
    return seen & (keys > own - window) if window else seen
