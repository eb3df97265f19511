"""Which format each weight of a module gets, and the store that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from edgeforge.cache import writable_cache
from edgeforge.errors import UsageError
from edgeforge.stage_progress import Progress
from exporters.modules.traced import ModuleWeight, TracedModule
from quant.errors import QuantizationError
from quant.formats.formats import IntFormat, WeightFormat, parse_format
from quant.plans.algorithms import is_calibrated
from quant.plans.plan import Assignment, QuantPlan
from quant.plans.recipes import find_recipe
from quant.quantizers.rtn import QuantizedRows
from quant.store.store import WeightStore

DEFAULT_RECIPE = "int8"
FEWEST_ROWS = 10
"""A weight of fewer rows stays float: it is small, and coremltools keeps no constant of fewer
elements beside the others, so that its scales could not be read back."""
_EIGHT = Assignment(parse_format("int8-pc"), "rtn")


def plan_of(traced: TracedModule, recipe: str) -> QuantPlan:
    """Returns the formats of the weights that a recipe quantizes.

    Kernels of convolutions have 8 bits in every integer recipe, and so has a matrix whose columns
    the recipe's groups do not divide. Weights that stay float, such as those of fewer than
    `FEWEST_ROWS` rows, are not in the plan.

    Raises:
        UsageError: the module has no weight to quantize, or the recipe is not one for modules.
        QuantizationError: there is no such recipe.
    """
    found = find_recipe(recipe)
    matrices = {n: w for n, w in traced.weights.items() if w.role != "conv"}
    shapes = {name: weight.matrix for name, weight in traced.weights.items()}
    roles = {name: str(weight.role) for name, weight in matrices.items()}
    # A recipe knows linear layers and embeddings; a convolution follows it as a linear layer.
    given = found.plan(shapes, {name: roles.get(name, "linear") for name in shapes}).weights
    chosen = {
        name: _chosen(traced.weights[name], assignment, recipe)
        for name, assignment in given.items()
        if _is_integer(assignment.format, recipe)
    }
    if not traced.weights and recipe != "fp32":
        raise UsageError(
            "the module has no weight to quantize: no parameter is read by a linear layer, a "
            "convolution or an embedding (--recipe fp32 exports it as it is)"
        )
    large = {n: a for n, a in chosen.items() if traced.weights[n].matrix[0] >= FEWEST_ROWS}
    return QuantPlan(recipe, large)


def _is_integer(format: WeightFormat, recipe: str) -> bool:
    if format.name == "fp32":
        return False
    if not isinstance(format, IntFormat) or not format.symmetric or format.bits not in (4, 8):
        raise UsageError(
            f"recipe {recipe} stores {format.name}, which modules do not take: they take fp32 and "
            f"symmetric integers of 4 and 8 bits, such as int8, int4 and int4-g64"
        )
    return True


def _chosen(weight: ModuleWeight, asked: Assignment, recipe: str) -> Assignment:
    if is_calibrated(asked.algorithm) or asked.activation != "none":
        raise UsageError(
            f"recipe {recipe} calibrates on a text, and a module has none: use int8, int4 or fp32"
        )
    if weight.role == "conv":
        return _EIGHT
    try:
        asked.format.check(weight.name, *weight.matrix)
    except QuantizationError:
        return _EIGHT
    return asked


@dataclass(frozen=True)
class ModuleWeights:
    """A module's weights as `quant.store.fill` reads them: matrices of float32."""

    traced: TracedModule
    names: Sequence[str]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Rows and columns by weight name."""
        return {name: self.traced.weights[name].matrix for name in self.names}

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """The parameter itself, in one piece."""
        return [(name, self.traced.weights[name].matrix[0])]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the matrix."""
        matrix = self.traced.state(name).detach().reshape(self.traced.weights[name].matrix)
        return matrix[start:stop].contiguous()

    def imported_rows(self, name: str, start: int, stop: int, format: IntFormat) -> QuantizedRows:
        """A module's weights are floats, so that no plan imports integers."""
        raise AssertionError(name)

    def imported_by_rows(self, name: str) -> bool:
        """A module's weights are floats."""
        return False

    def digest(self) -> str:
        """SHA-256 of the weights' names, shapes and values."""
        return digest_of_tensors({name: self.traced.state(name) for name in self.names})


def digest_of_tensors(tensors: Mapping[str, object]) -> str:
    """SHA-256 of names, shapes and values; what is no tensor is left out."""
    found = hashlib.sha256()
    for name, given in tensors.items():
        if isinstance(given, torch.Tensor):
            tensor = given.detach().contiguous()
            found.update(f"{name} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def quantize(
    traced: TracedModule, plan: QuantPlan, threads: int | None, progress: Progress
) -> WeightStore | None:
    """Returns the store of a module's weights, from the cache or made now; None for an empty plan.

    Raises:
        QuantizationError: a weight cannot be quantized, or the cache cannot be used.
    """
    if not plan.weights:
        return None
    from quant.store.cached import find_store, new_store, store_key
    from quant.store.fill import fill_store

    weights = ModuleWeights(traced, list(plan.weights))
    plan.check(weights.shapes())
    cache = writable_cache() / "stores"
    key = store_key(weights.digest(), "module", plan)
    found = find_store(cache, key)
    if found is None:
        with new_store(cache, key, plan, weights.shapes()) as writer:
            fill_store(weights, plan, writer, threads=threads)
        found = WeightStore(cache / key)
    progress("quantize", 1, 1)
    return found
