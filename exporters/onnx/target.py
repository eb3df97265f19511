"""The ONNX target: two graphs over one weight file, and the runtimes' configuration files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from exporters.checks import (
    ACTIVATIONS,
    check_draft_positions,
    check_float_activations,
    refuse_palettes,
)
from exporters.errors import ExportError
from exporters.float_columns import FloatColumns
from exporters.footprint import check_memory, estimate
from exporters.options import Choices, TargetOptions
from exporters.runtime_memory import Footprint, RuntimeCosts
from exporters.structure import Section
from exporters.target import ExportRequest, Lowered, ModelFacts
from quant.formats.formats import IntFormat
from quant.plans.plan import QuantPlan, matrix_shape

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

    from exporters.onnx.weight_file import WeightFile
    from quant.program.program import Program

# ONNX Runtime keeps two copies of a tied matrix: one in the embedding's layout, and one that the
# product's kernel has packed. Of a mixture of experts it holds the tokens' rows, their results, and
# these sorted and weighted (`exporters.onnx.experts`).
COSTS: Final = RuntimeCosts(
    cache_element=4, tied_copies=2, run_tokens=128, scores=True, expert_rows=4
)
GRAPH, VERIFY_GRAPH, WEIGHTS = "model.onnx", "verify.onnx", "model.onnx.data"
DRAFT_GRAPH: Final = "draft.onnx"


class OnnxTarget:
    """ONNX with ONNX Runtime's contrib operators, for CPUs and phones."""

    name = "onnx"
    about = "ONNX Runtime on CPU, Android, iOS and C# (also through onnxruntime-genai)"
    options: Choices = MappingProxyType(
        {
            "strip": (),
            "kv_cache": ("fp32", "int8"),
            "activations": ACTIVATIONS,
            "max_memory": (),
            "draft_positions": (),
        }
    )
    passed_over: Mapping[str, str] = MappingProxyType({})
    static_caches: tuple[str, ...] = ("int8",)

    def check(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> None:
        """Refuses palettes, block sizes and head widths that ONNX Runtime's kernels do not have."""
        from exporters.onnx.attention import check_head_width
        from exporters.onnx.quantized import block_size
        from exporters.onnx.rounded import check_rounded

        refuse_palettes(plan, "ONNX Runtime")
        check_float_activations(plan, options)
        check_draft_positions(options, facts.context)
        footprint = self.footprint(plan, shapes, facts, options)
        check_memory(self.name, footprint, facts.context, options.max_memory)
        check_head_width(facts.head_dim)
        check_rounded(plan)
        for weight, assignment in plan.weights.items():
            if isinstance(assignment.format, IntFormat):
                block_size(weight, assignment.format, matrix_shape(shapes[weight])[1])

    def footprint(
        self,
        plan: QuantPlan,
        shapes: Mapping[str, tuple[int, ...]],
        facts: ModelFacts,
        options: TargetOptions,
    ) -> Footprint:
        """What ONNX Runtime keeps; int8 caches have fixed scales, which take no memory a token."""
        costs = replace(COSTS, cache_element=1) if options.kv_cache == "int8" else COSTS
        return estimate(plan, shapes, facts, costs)

    def write(self, request: ExportRequest, folder: Path) -> Lowered:
        """Writes the graphs, their weight file, and the files that onnxruntime-genai reads."""
        import onnx

        from exporters.last_token import keep_last_token
        from exporters.onnx.caches import NOTE
        from exporters.onnx.genai import genai_config, refusals
        from exporters.onnx.genai_tokenizer import write_tokenizer
        from exporters.onnx.notes import (
            mixture_notes,
            outside_notes,
            recurrence_notes,
            rounding_notes,
        )
        from exporters.onnx.weight_file import WeightFile

        weights = WeightFile(WEIGHTS)
        generate, kept = _model(keep_last_token(request.program), request, weights)
        models = {GRAPH: generate}
        positions = request.options.draft_positions
        if positions is not None:
            # onnxruntime-genai has room for one row of logits, or one a token: not for K.
            drafted = keep_last_token(request.program, positions)
            models[DRAFT_GRAPH], _ = _model(drafted, request, weights)
        if not request.options.strip:
            models[VERIFY_GRAPH], _ = _model(request.program, request, weights)
        weights.write(folder)
        for name, model in models.items():
            (folder / name).write_bytes(model.SerializeToString(deterministic=True))
            try:
                onnx.checker.check_model(str(folder / name))
            except onnx.checker.ValidationError as error:
                raise ExportError(f"onnx.checker refuses {name}: {error}") from error
        warnings = write_tokenizer(request.tokenizer_files, folder)
        config = genai_config(request, GRAPH)
        (folder / "genai_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        graph = models[GRAPH].graph
        return Lowered(
            entry=GRAPH,
            inputs={v.name: _describe(v) for v in graph.input if not v.name.startswith("past")},
            outputs={
                v.name if name == GRAPH else f"{name} {v.name}": _describe(v)
                for name in (GRAPH, DRAFT_GRAPH)
                if name in models
                for v in models[name].graph.output
                if not v.name.startswith("present.")
            },
            states={v.name: _describe(v) for v in _past(graph)},
            notes=(
                *rounding_notes(graph, request.store.plan, kept),
                *mixture_notes(request.program),
                *recurrence_notes(request.program),
                *outside_notes(request.program),
                *((NOTE,) if request.cache_ranges else ()),
                *((_drafts(positions),) if positions is not None else ()),
            ),
            warnings=(*warnings, *refusals(_states(graph))),
            float_columns=kept,
        )

    def stored_digests(self, folder: Path) -> Mapping[str, str]:
        """Digests of the integers and scales that the graphs and their weight file hold."""
        from exporters.onnx.reader import stored_digests

        return stored_digests(*graphs_of(folder))

    def structure(self, folder: Path) -> tuple[Section, ...]:
        """Tables of the graphs' operators, quantized products, caches and initializers."""
        from exporters.onnx.structure import structure_of

        return structure_of(graphs_of(folder))


def graphs_of(folder: Path) -> list[Path]:
    """The graphs of an artifact; those for drafts and for verification may be absent."""
    graphs = folder / GRAPH, folder / DRAFT_GRAPH, folder / VERIFY_GRAPH
    return [graph for graph in graphs if graph == graphs[0] or graph.is_file()]


def _model(
    program: Program, request: ExportRequest, weights: WeightFile
) -> tuple[ModelProto, FloatColumns]:
    """Lowers a program to one graph with typed inputs and outputs.

    Returns:
        The graph, and the columns whose activations stay float32 in it.
    """
    from onnx import TensorProto, helper

    from exporters.onnx.graph import GraphBuilder
    from exporters.onnx.lowering import lower
    from quant.program.program import shape_of

    builder = GraphBuilder(weights)
    lowered = lower(program, request.store, builder, request.cache_ranges, request.float_columns)
    batch, new, total = "batch_size", "sequence_length", "total_sequence_length"
    tensor = helper.make_tensor_value_info
    inputs = [
        tensor("input_ids", TensorProto.INT64, [batch, new]),
        tensor("attention_mask", TensorProto.INT64, [batch, total]),
    ]
    output = program.output()
    builder.node("Identity", [lowered.name(output)], "logits")
    length = shape_of(output)[1]
    kept = output.meta.get("positions", 0)
    rows = "draft_length" if kept > 1 else new if length == -1 else length
    shape = [batch, rows, program.vocab_size]
    outputs = [tensor("logits", TensorProto.FLOAT, shape)]
    cache = TensorProto.INT8 if request.cache_ranges else TensorProto.FLOAT
    for each in lowered.states:
        if each.kind == "cache":
            first, last = each.shape
            inputs.append(tensor(each.past, cache, [batch, first, "past_length", last]))
            outputs.append(tensor(each.present, cache, [batch, first, "cache_length", last]))
        else:
            inputs.append(tensor(each.past, TensorProto.FLOAT, [batch, *each.shape]))
            outputs.append(tensor(each.present, TensorProto.FLOAT, [batch, *each.shape]))
    return builder.model(inputs, outputs), lowered.kept


def _past(graph: GraphProto) -> list[ValueInfoProto]:
    """The inputs that are states."""
    return [given for given in graph.input if given.name.startswith("past")]


def _states(graph: GraphProto) -> Iterator[tuple[str, tuple[int | str, ...]]]:
    """The name and the shape of each state, without the batch."""
    for given in _past(graph):
        dims = given.type.tensor_type.shape.dim
        yield given.name, tuple(d.dim_param or d.dim_value for d in dims[1:])


def _drafts(positions: int) -> str:
    """A note on the graph for drafts."""
    return (
        f"{DRAFT_GRAPH} takes the same inputs and caches as {GRAPH} and gives the logits of the "
        f"last {positions} tokens of a call, or of all where there are fewer: an app that "
        f"speculates opens it instead"
    )


def _describe(info: ValueInfoProto) -> str:
    from onnx import TensorProto

    kind = info.type.tensor_type
    dims = [d.dim_param or str(d.dim_value) for d in kind.shape.dim]
    return f"{TensorProto.DataType.Name(kind.elem_type).lower()}[{', '.join(dims)}]"
