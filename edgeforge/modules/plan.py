"""Which format each weight of a module gets, and the store that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgeforge.cache import writable_cache
from edgeforge.errors import UsageError
from edgeforge.modules.calibrate import Calibration, fill_calibrated
from edgeforge.modules.digest import digest_of_tensors
from edgeforge.modules.options import ModuleOptions
from edgeforge.stage_progress import Progress
from exporters.modules.traced import ModuleWeight, TracedModule
from quant.errors import QuantizationError
from quant.formats.formats import IntFormat, WeightFormat, parse_format
from quant.plans.algorithms import ALGORITHMS, Algorithm
from quant.plans.plan import Assignment, QuantPlan, calibrated_weights
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
    algorithm = ALGORITHMS.get(asked.algorithm, Algorithm())
    if algorithm.rescales or algorithm.positive is not None or asked.activation != "none":
        raise UsageError(
            f"recipe {recipe} ({asked.algorithm}) is for language models: modules take rounding to "
            f"nearest and GPTQ, such as int8, int4 and int4-gptq, and fp32"
        )
    if weight.role == "conv":
        return _EIGHT
    if weight.role == "embedding" and algorithm.calibrated:
        asked = replace(asked, algorithm="rtn")  # a table has no inputs to multiply
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


def quantize(
    traced: TracedModule,
    plan: QuantPlan,
    threads: int | None,
    progress: Progress,
    calibration: Calibration | None = None,
) -> WeightStore | None:
    """Returns the store of a module's weights, from the cache or made now; None for an empty plan.

    Args:
        traced: the module.
        plan: of its weights.
        threads: for the quantizers; None for one per processor, at most four.
        progress: told when it is done.
        calibration: what calibrated algorithms of the plan are given.

    Raises:
        QuantizationError: a weight cannot be quantized, or the cache cannot be used.
    """
    if not plan.weights:
        return None
    from quant.store.cached import find_store, new_store, store_key
    from quant.store.fill import fill_store

    calibrated = set(calibrated_weights(plan))
    assert calibration is not None or not calibrated
    weights = ModuleWeights(traced, list(plan.weights))
    plan.check(weights.shapes())
    cache = writable_cache() / "stores"
    basis = calibration.digest(traced) if calibration is not None and calibrated else ""
    key = store_key(weights.digest(), "module", plan, basis)
    found = find_store(cache, key)
    if found is None:
        with new_store(cache, key, plan, weights.shapes()) as writer:
            free = {name: each for name, each in plan.weights.items() if name not in calibrated}
            if free:
                fill_store(weights, QuantPlan(plan.recipe, free), writer, threads=threads)
            if calibration is not None and calibrated:
                fill_calibrated(traced, plan, writer, calibration, threads)
        found = WeightStore(cache / key)
    progress("quantize", 1, 1)
    return found


def calibration_notes(
    traced: TracedModule,
    plan: QuantPlan,
    calls: Sequence[Mapping[str, torch.Tensor]],
    options: ModuleOptions,
) -> list[str]:
    """What a user must know of how the calibrated weights of a plan came about."""
    calibrated = calibrated_weights(plan)
    if not calibrated:
        return []
    what = "the example inputs alone"
    if options.calibration or options.inputs:
        what = f"{len(calls)} calls" if len(calls) > 1 else "one call"
    if not options.calibration:
        what += ", which verify runs, too: give others with --calibration"
    found = [f"{len(calibrated)} linear layers were calibrated on {what}"]
    rest = [name for name in plan.weights if name not in set(calibrated)]
    if rest:
        found.append(
            f"{len(rest)} weights of convolutions and embeddings were rounded to nearest: GPTQ is "
            f"for linear layers"
        )
    return found
