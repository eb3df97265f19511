"""What a plan does with the matrices of the vocabulary, which are most of a small model's bytes.

At equal bytes, finer formats pay more in a few matrices of the layers, so the recipe ``int4`` keeps
the embedding in 4 bits, also where the head is tied to it. Beyond those, 8 bits pay most there: the
recipes ``int4-vocab8`` have them. docs/recipes.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edgeforge.families.assembly import EMBEDDING, HEAD
from edgeforge.sizes import size_text
from quant.formats.formats import IntFormat, parse_format
from quant.plans.plan import matrix_shape
from quant.plans.recipes import VOCABULARY_RECIPES

LARGE: Final = 0.1
"""From this share of the weights on, the vocabulary's matrices are told."""


def vocabulary_note(
    recipe: str, formats: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """Says in one sentence what a recipe chose for a large vocabulary; empty for others.

    Args:
        recipe: the recipe's name; only those that have a choice are told.
        formats: each weight's format by name.
        shapes: each weight's shape by name.
    """
    other = VOCABULARY_RECIPES.get(recipe)
    names = [name for name in (EMBEDDING, HEAD) if name in formats]
    sizes = {name: rows * columns for name, (rows, columns) in _matrices(shapes).items()}
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    parsed = {name: parse_format(formats[name]) for name in names}
    small = [n for n, f in parsed.items() if isinstance(f, IntFormat) and f.bits < 8]
    if other is None or share < LARGE or not small:
        return ""
    taken = sum(parsed[name].nbytes(*shapes[name]) for name in names)
    eight = parse_format("int8-pc")
    more = sum(eight.nbytes(*shapes[n]) - parsed[n].nbytes(*shapes[n]) for n in small)
    what = "embedding and head have" if HEAD in names else "the embedding, also the head, has"
    kinds = " and ".join(dict.fromkeys(formats[name] for name in names))
    return (
        f"{what} {share:.0%} of the weights and {size_text(taken)} in {kinds}, because bits pay "
        f"more in the layers; 8 bits would take {size_text(more)} more: --recipe {other}"
    )


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    return {name: matrix_shape(shape) for name, shape in shapes.items()}
