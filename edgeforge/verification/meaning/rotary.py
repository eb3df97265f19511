"""Holds the stored cosines and sines against the checkpoint's rotary embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from edgeforge.families.spec import RopeSpec
from edgeforge.model.rope import inverse_frequencies, tables, uses_long_set
from edgeforge.verification.meaning.findings import Findings
from exporters.lifted import Array

# Tables are computed in float64 and rounded once; processors' cosines differ in the last digit.
_SLACK: Final = {4: 2.0**-22, 2: 2.0**-10}
_NEAR: Final = 1e-3


class Rotary:
    """What must be, computed once for all layers and entry points.

    Args:
        ropes: the checkpoint's rotary embeddings.
        context: the declared context, tokens.
    """

    def __init__(self, ropes: tuple[RopeSpec, ...], context: int) -> None:
        self._each = [_Tables(rope, context) for rope in ropes]

    def open(self, findings: Findings) -> None:
        """Opens the facts that `hold` looks at; none where no layer rotates."""
        if not self._each:
            return
        ropes = [each.rope for each in self._each]
        alone = len(ropes) == 1
        thetas = " and ".join(f"{rope.theta:g}" for rope in ropes)
        kinds = " and ".join(rope.scaling for rope in ropes)
        findings.fact("rope_theta", f"rope theta is {thetas}", ropes[0].theta if alone else None)
        findings.fact("rope_type", f"the rotary embedding is of the type {kinds}")
        findings.fact(
            "rope_tables", "every stored cosine and sine is that of its position and pair"
        )
        for each in self._each:
            if each.rope.scaling == "longrope":
                findings.fact("rope_set", f"longrope's {each.set_name()} factors are stored")

    def hold(self, index: int, cos: Array, sin: Array, place: str, findings: Findings) -> None:
        """Notes what is found in a pair of tables.

        Args:
            index: which of the rotary embeddings it must be.
            cos: ``float[positions, width // 2]``.
            sin: in the same shape.
            place: where they are read, in words.
            findings: takes what is found.
        """
        self._each[index].hold(cos, sin, place, findings)


class _Tables:
    """What the tables of one rotary embedding must hold."""

    def __init__(self, rope: RopeSpec, context: int) -> None:
        self.rope, self.context = rope, context
        self._tables = tuple(each.numpy() for each in tables(rope, context))
        self._frequencies = inverse_frequencies(rope, context).numpy()
        self._noted: set[tuple[int, int, str]] = set()
        self._verdicts: dict[tuple[int, int], tuple[Array, Array, list[tuple[str, str]]]] = {}

    def hold(self, cos: Array, sin: Array, place: str, findings: Findings) -> None:
        """Notes what is found in a pair of tables; arguments as `Rotary.hold`."""
        key = id(cos), id(sin)
        if key not in self._verdicts:  # the arrays are kept, so that no other gets their id
            self._verdicts[key] = cos, sin, self._problems(cos, sin, findings)
        if (*key, place) in self._noted:
            return
        self._noted.add((*key, place))
        problems = dict(self._verdicts[key][2])
        for name in ("rope_theta", "rope_type", "rope_set", "rope_tables"):
            if name == "rope_set" and self.rope.scaling != "longrope":
                continue
            findings.same(name, name not in problems, place, f"{place}: {problems.get(name, '')}")

    def set_name(self) -> str:
        """Which of longrope's sets of factors is used."""
        return "long" if uses_long_set(self.rope, self.context) else "short"

    def _problems(self, cos: Array, sin: Array, findings: Findings) -> list[tuple[str, str]]:
        """The facts that are otherwise in a pair of tables, each with a clause."""
        wanted_cos, wanted_sin = self._tables
        rows, pairs = wanted_cos.shape
        fits = cos.ndim == 2 and cos.shape == sin.shape and cos.shape[1] == pairs and len(cos) > 1
        if not fits or cos.dtype.itemsize not in _SLACK:
            return [("rope_tables", f"tables of {list(cos.shape)}, not {[rows, pairs]}")]
        slack = _SLACK[cos.dtype.itemsize] * max(1.0, self.rope.attention_factor)
        count = min(rows, len(cos))
        # A NaN is at most nothing, so it is wrong too.
        right = np.abs(cos[:count].astype(np.float64) - wanted_cos[:count]) <= slack
        right &= np.abs(sin[:count].astype(np.float64) - wanted_sin[:count]) <= slack
        wrong = ~right
        if not wrong.any():
            return []
        found = [("rope_tables", _where(wrong, rows))]
        stored = _frequencies(cos, sin)
        if _near(stored, self._frequencies):
            return found
        return [self._cause(stored, findings), *found]

    def _cause(self, stored: Array, findings: Findings) -> tuple[str, str]:
        """Which fact explains other frequencies than the expected ones."""
        rope = self.rope
        if rope.scaling == "longrope":
            name = self.set_name()
            context = rope.original_context + (0 if name == "long" else 1)
            other = inverse_frequencies(rope, context).numpy()
            if _near(stored, other):
                swapped = "short" if name == "long" else "long"
                return "rope_set", f"longrope's {swapped} factors are stored, not its {name} ones"
        theta = _fitted(stored / self._frequencies, rope)
        if theta is not None:
            findings.number("rope_theta", theta)
            return "rope_theta", f"rope theta is {theta:.6g} in the tables, not {rope.theta:g}"
        if rope.scaling != "default":
            plain = inverse_frequencies(RopeSpec(rope.theta, rope.width), self.context).numpy()
            if _near(stored, plain):
                return "rope_type", f"the tables are of the type default, not {rope.scaling}"
        theta = _fitted(stored, replace(rope, theta=1.0))
        if theta is not None:
            findings.number("rope_theta", theta)
            return "rope_theta", f"rope theta is {theta:.6g} in the tables, not {rope.theta:g}"
        return "rope_type", f"the tables' frequencies are not those of the type {rope.scaling}"


def _frequencies(cos: Array, sin: Array) -> Array:
    """The angle per position of each pair, from the second row: ``float64[pairs]``."""
    found: Array = np.arctan2(sin[1].astype(np.float64), cos[1].astype(np.float64))
    return found


def _near(found: Array, wanted: Array) -> bool:
    return bool((np.abs(found - wanted) <= _NEAR * np.abs(wanted) + 1e-6).all())


def _fitted(ratios: Array, rope: RopeSpec) -> float | None:
    """The theta that explains the ratios to the frequencies of another theta, if one does."""
    exponents = np.arange(len(ratios)) * 2 / rope.width
    good = ratios > 1e-6
    if len(ratios) < 2 or not good[1:].any() or abs(ratios[0] - 1) > _NEAR:
        return None
    # Small angles have few digits in float16: the first pairs tell most.
    index = np.flatnonzero(good)[1:4]
    logs = -np.log(ratios[index]) / exponents[index]
    change = float(np.exp(logs[0]))
    explained = change ** -exponents[good]
    if not (np.abs(explained / ratios[good] - 1) <= 0.02).mean() >= 0.75:
        return None
    return rope.theta * change


def _where(wrong: Array, rows: int) -> str:
    positions = np.flatnonzero(wrong.any(1))
    pairs = np.flatnonzero(wrong.any(0))
    first, last = int(positions[0]), int(positions[-1])
    some = f"from position {first} to {last}" if last + 1 < rows else f"from position {first} on"
    return f"the stored cosines and sines are others {some} (pair {int(pairs[0])} first)"
