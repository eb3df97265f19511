"""A spec without a family's file, with random weights, and what a target makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edgeforge.families.facts import facts_of
from edgeforge.families.spec import ModelSpec
from edgeforge.model import trace
from exporters.options import TargetOptions
from exporters.target import ExportRequest, Lowered, Target
from quant.formats.activations import NONE, Activation
from quant.plans.plan import QuantPlan, is_quantized
from quant.plans.recipes import find_recipe
from quant.program.program import Program
from quant.program.rewrite import quantize_program
from quant.store.cached import new_store
from quant.store.fill import fill_store
from quant.store.store import WeightStore


class SpecWeights:
    """Random float32 weights of a spec, skewed so that asymmetry shows; norms are near one."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec, generator = spec, torch.Generator().manual_seed(seed)
        self.tensors: dict[str, torch.Tensor] = {}
        for name, weight in spec.weights.items():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.role == "norm" and len(weight.shape) == 1 and name.endswith(".weight"):
                self.tensors[name] = 1 + drawn * 0.1
            elif weight.form == "negative_exponential":  # of a decay
                self.tensors[name] = -drawn.exp()
            elif len(weight.shape) == 1:
                self.tensors[name] = drawn * 0.3
            else:
                self.tensors[name] = (drawn + drawn.square() * 0.3) / weight.shape[1] ** 0.5

    def shapes(self):
        return {name: weight.shape for name, weight in self.spec.weights.items()}

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        shape = self.spec.weights[name].shape
        return [(name, 1 if len(shape) == 1 else shape[0])]

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensors[name]
        return tensor.reshape(-1, tensor.shape[-1])[start:stop]


class LoweredSpec:
    """A spec's programs and store, from which targets write.

    Args:
        spec: the model.
        folder: where the store is kept.
        recipe: a recipe's name.
        context: the declared context, tokens.
        activation: how integer products round their activations.
    """

    def __init__(
        self,
        spec: ModelSpec,
        folder: Path,
        recipe: str,
        context: int = 48,
        activation: Activation = NONE,
    ) -> None:
        self.weights = SpecWeights(spec)
        roles = {name: weight.role for name, weight in spec.weights.items()}
        self.plan: QuantPlan = find_recipe(recipe).plan(self.weights.shapes(), roles)
        if activation != NONE:
            products = {
                name: replace(each, activation=activation)
                for name, each in self.plan.weights.items()
                if roles[name] == "linear" and is_quantized(each.format)
            }
            self.plan = replace(self.plan, weights={**self.plan.weights, **products})
        self.float_program = trace.trace(spec, context)
        self.program: Program = quantize_program(self.float_program, self.plan)
        with new_store(folder, "a" * 40, self.plan, self.weights.shapes()) as writer:
            fill_store(self.weights, self.plan, writer)
        self.store = WeightStore(folder / ("a" * 40))
        self.facts = facts_of(spec, context)

    def float_weight(self, given) -> torch.Tensor:
        return self.weights.tensors[given.name]

    def write(self, target: Target, folder: Path, **more) -> Lowered:
        """Checks the plan and writes the target's files."""
        options = more.pop("options", TargetOptions())
        target.check(self.plan, self.weights.shapes(), self.facts, options)
        folder.mkdir(parents=True)
        request = ExportRequest(self.program, self.store, self.facts, options=options, **more)
        return target.write(request, folder)
