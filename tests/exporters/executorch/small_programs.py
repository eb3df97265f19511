"""Artifacts of specs that no family has, and the logits that torch gives for their programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from edgeforge.families.facts import facts_of
from edgeforge.families.spec import ModelSpec
from edgeforge.model.trace import trace
from exporters.executorch.target import ExecutorchTarget
from exporters.float_columns import ALL, FloatColumns
from exporters.options import TargetOptions
from exporters.target import ExportRequest, Lowered
from quant.formats.formats import FloatFormat, parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.program import dialect
from quant.program.program import Program
from quant.program.rewrite import quantize_program
from quant.store.cached import new_store
from quant.store.fill import fill_store
from quant.store.store import WeightStore
from tests.oracles.lowered_spec import SpecWeights

KEY = "b" * 40
Change = Callable[[torch.Tensor], torch.Tensor]


class _Changed(torch.fx.Interpreter):
    """Runs a graph with the activations of some calls changed before them.

    Args:
        program: the program.
        activations: what products with integers multiply by, by their node; None for all as is.
        cached: what attention's new keys and values become; None for as they are.
    """

    def __init__(self, program: Program, activations, cached: Change | None) -> None:
        super().__init__(torch.fx.GraphModule(torch.nn.Module(), program.graph))
        self.activations, self.cached = activations, cached

    def run_node(self, node):
        if node.target is dialect.QUANT_LINEAR and self.activations is not None:
            args, _ = self.fetch_args_kwargs_from_env(node)
            return node.target(self.activations(node, args[0]), *args[1:])
        if node.target is dialect.ATTENTION and self.cached is not None:
            (q, *new), rest = (lambda args: (args[:3], args[3:]))(
                self.fetch_args_kwargs_from_env(node)[0]
            )
            return node.target(q, *map(self.cached, new), *rest)
        return super().run_node(node)


@dataclass(frozen=True)
class Made:
    """An artifact, and the program and store that it was made of."""

    folder: Path
    spec: ModelSpec
    program: Program
    store: WeightStore
    lowered: Lowered

    def logits(self, tokens, kept: FloatColumns | None = None, cached: Change | None = None):
        """What torch gives for a whole text from position 0 on: ``float32[t, vocab]``.

        Args:
            tokens: the text, ``int64[t]``.
            kept: which columns stay float32 where products with integers round each token's
                activations, as XNNPACK does; None for products that round nothing.
            cached: what attention's new keys and values become.
        """

        def activations(node, x):
            columns = kept.get(self.program.inputs[node.args[1].name].name, ())
            if columns == ALL:
                return x
            rest = x.clone()
            rest[..., list(columns)] = 0
            rest = torch.ops.edgeforge.round_per_token(rest)
            rest[..., list(columns)] = x[..., list(columns)]
            return rest

        given = []
        for node in self.program.graph.nodes:
            if node.op != "placeholder":
                continue
            what, shape = self.program.inputs[node.name], node.meta["val"].shape
            match what.kind:
                case "tokens":
                    given.append(torch.from_numpy(tokens)[None])
                case "position":
                    given.append(torch.zeros(1, dtype=torch.int64))
                case "weight":
                    given.append(self.store.part(what.name, what.part).reshape(shape))
                case "table":
                    given.append(self.program.tables[what.name])
                case _:
                    given.append(torch.zeros(tuple(shape)))
        rounding = None if kept is None else activations
        with torch.no_grad():
            result = _Changed(self.program, rounding, cached).run(*given)
        return (result[0] if isinstance(result, tuple | list) else result)[0].numpy()


_TRACED: dict[tuple[int, int], tuple[ModelSpec, Program]] = {}


def _traced(spec: ModelSpec, context: int) -> Program:
    """A spec's program, traced once for all tests of a process."""
    key = id(spec), context
    if key not in _TRACED:  # the spec is kept, so that no other gets its id
        _TRACED[key] = spec, trace(spec, context)
    return _TRACED[key][1]


def make(
    spec: ModelSpec,
    folder: Path,
    format: str = "fp32",
    *,
    context: int = 48,
    float_columns: FloatColumns | None = None,
    source: SpecWeights | None = None,
    **options: object,
) -> Made:
    """Exports a spec with random weights, whose matrices all have one format."""
    source = source or SpecWeights(spec)
    assigned = {}
    for name, weight in spec.weights.items():
        whole = weight.role in ("norm", "bias", "conv", "router", "gain", "gate")
        form = parse_format("fp32" if whole else format)
        assigned[name] = Assignment(form, "cast" if isinstance(form, FloatFormat) else "rtn")
    plan = QuantPlan("mine", assigned)
    with new_store(folder, KEY, plan, source.shapes()) as writer:
        fill_store(source, plan, writer, threads=1)
    store = WeightStore(folder / KEY)
    program, facts = quantize_program(_traced(spec, context), plan), facts_of(spec, context)
    asked, target, out = TargetOptions(**options), ExecutorchTarget(), folder / "artifact"
    target.check(plan, source.shapes(), facts, asked)
    out.mkdir()
    request = ExportRequest(program, store, facts, options=asked, float_columns=float_columns or {})
    return Made(out, spec, program, store, target.write(request, out))
