"""What each stored matrix costs alone, and which of them are worth more bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from torch import Tensor

from edgeforge.families.facts import facts_of
from edgeforge.model.model import Model
from edgeforge.planning.candidates import allowed_formats
from edgeforge.planning.sensitivity import stored_divergences
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.errors import QuantizationError
from quant.formats import packing
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, parse_format
from quant.kernels import native
from quant.plans.algorithms import ALGORITHMS
from quant.plans.plan import matrix_shape
from quant.plans.rules import stays_float32
from quant.program.program import Program
from quant.store.fill import stored_values
from quant.store.store import WeightStore

UPGRADES: Final = 6
"""How many matrices are tried with more bits: those that cost most."""
_BETTER: Final = "int8-pc"


@dataclass(frozen=True)
class WeightCost:
    """A matrix as the artifact stores it.

    Attributes:
        name: the matrix.
        format: how it is stored.
        nbytes: its stored bytes.
        relative_error: the norm of its rounding error over that of the weight.
        kl: the KL divergence from FLOAT, nats a token, with this matrix alone as stored.
        share: that over the sum of all matrices'.
    """

    name: str
    format: str
    nbytes: int
    relative_error: float
    kl: float
    share: float


@dataclass(frozen=True)
class Upgrade:
    """A matrix with more bits.

    Attributes:
        name: the matrix.
        format: the format with more bits.
        costs: further bytes.
        saves: the share of the sum of all matrices' divergences that it removes.
    """

    name: str
    format: str
    costs: int
    saves: float


def weight_costs(
    manifest: Manifest,
    model: Model,
    program: Program,
    store: WeightStore,
    blocks: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> tuple[list[WeightCost], list[Upgrade]]:
    """Measures what each matrix costs alone, the dearest first, and what more bits would save.

    A recipe that rescales columns stores other weights than the checkpoint's, which cannot be
    exchanged one by one: for it both lists are empty.

    Args:
        manifest: the artifact's.
        model: the model whose weights the store holds, rotated if the artifact's are.
        program: its program in the float dialect.
        store: the weight store.
        blocks: the text; each block is a text of its own.
        progress: called with the number of matrices done and of all.
    """
    records = manifest.weights
    if any(_rescales(record.algorithm) for record in records.values()):
        return [], []
    shapes, roles = model.weights.shapes(), model.weights.roles()
    matrices = {n: shape for n, shape in shapes.items() if not stays_float32(shape, roles[n])}
    stored = {name: partial(_matrix, store, name, records[name].format) for name in matrices}
    kl = stored_divergences(model.weights, program, stored, blocks, progress)
    total = sum(kl.values()) or 1.0
    costs = [
        WeightCost(
            name=name,
            format=records[name].format,
            nbytes=parse_format(records[name].format).nbytes(*matrix_shape(matrices[name])),
            relative_error=records[name].relative_error,
            kl=found,
            share=found / total,
        )
        for name, found in kl.items()
    ]
    costs.sort(key=lambda cost: -cost.kl)
    return costs, _upgrades(costs, manifest, model, program, blocks, total)


def _upgrades(
    costs: Sequence[WeightCost],
    manifest: Manifest,
    model: Model,
    program: Program,
    blocks: Sequence[Sequence[int]],
    total: float,
) -> list[Upgrade]:
    """Tries more bits for the dearest matrices."""
    facts = facts_of(model.spec, manifest.context)
    target = find_target(manifest.target)
    try:
        shapes, roles = model.weights.shapes(), model.weights.roles()
        kept = [name for name, shape in shapes.items() if stays_float32(shape, roles[name])]
        allowed = allowed_formats(shapes, facts, [target], TargetOptions(), [_BETTER], kept=kept)
    except (ExportError, QuantizationError):
        return []
    better: dict[str, Callable[[], Tensor]] = {}
    more: dict[str, int] = {}
    for cost in costs[:UPGRADES]:
        given = allowed.get(cost.name)
        if not given:
            continue
        shape = matrix_shape(model.weights.shapes()[cost.name])
        further = given[0].format.nbytes(*shape) - cost.nbytes
        if further <= 0:
            continue
        more[cost.name] = further
        better[cost.name] = lambda name=cost.name, to=given[0]: stored_values(  # type: ignore[misc]
            model.weights.float_weight(name), to, name
        )
    kl = stored_divergences(model.weights, program, better, blocks) if better else {}
    before = {cost.name: cost.kl for cost in costs}
    found = [
        Upgrade(name, _BETTER, more[name], (before[name] - after) / total)
        for name, after in kl.items()
    ]
    return sorted((each for each in found if each.saves > 0), key=lambda each: -each.saves)


def _matrix(store: WeightStore, name: str, format_name: str) -> Tensor:
    """The values of a stored matrix, ``float32[rows, columns]``."""
    format = parse_format(format_name)
    if isinstance(format, FloatFormat):
        return store.part(name, "value").float()
    codes = store.part(name, "codes")
    if isinstance(format, PaletteFormat):
        return packing.look_up(codes, store.part(name, "lut"), format)
    assert isinstance(format, IntFormat)
    zero_point = None if format.symmetric else store.part(name, "zero_point")
    return native.unpack(codes, store.part(name, "scale"), zero_point, format)


def _rescales(algorithm: str) -> bool:
    return algorithm in ALGORITHMS and ALGORITHMS[algorithm].rescales


def by_kind(costs: Sequence[WeightCost]) -> Mapping[str, float]:
    """The shares of matrices by their kind, the largest first.

    >>> by_kind([WeightCost("model.layers.0.mlp.down_proj.weight", "int8-pc", 1, 0.1, 0.5, 1.0)])
    {'mlp.down_proj': 1.0}
    """
    shares: dict[str, float] = {}
    for cost in costs:
        kind = kind_of(cost.name)
        shares[kind] = shares.get(kind, 0.0) + cost.share
    return dict(sorted(shares.items(), key=lambda each: -each[1]))


def kind_of(name: str) -> str:
    """A weight's kind: its name without its layer and its expert.

    >>> kind_of("model.layers.12.self_attn.o_proj.weight"), kind_of("lm_head.weight")
    ('self_attn.o_proj', 'lm_head')
    >>> kind_of("model.layers.0.mlp.experts.7.down_proj.weight")
    'mlp.experts.down_proj'
    """
    words = name.removesuffix(".weight").removeprefix("model.").split(".")
    kept = words[2:] if words[0] == "layers" else words
    return ".".join(word for word in kept if not word.isdecimal())
