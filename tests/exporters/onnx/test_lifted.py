"""What the reader lifts of a graph is what the spec says, and of an altered graph is not."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_harness.onnx_session import OnnxSession
from exporters.float_columns import ALL
from exporters.lifted import (
    Attention,
    Bias,
    Clamp,
    Gelu,
    LayerNorm,
    Linear,
    Norm,
    Product,
    Rope,
    Scaled,
    ShortConv,
    Sigmoid,
    Silu,
    Softcap,
    Sum,
    Unknown,
    Value,
)
from exporters.lifted_mixture import (
    ChosenSlots,
    ChosenTokens,
    Combine,
    Route,
    RouteSparseMixer,
    Slots,
)
from exporters.lifted_recurrent import (
    Function,
    Gain,
    Previous,
    Recurrence,
    UnitNorm,
)
from exporters.onnx.lifted import read_graphs
from exporters.onnx.target import OnnxTarget, graphs_of
from quant.program import dialect
from tests.exporters.onnx.lifted_checks import check_lifted, lifted
from tests.exporters.onnx.vocabulary_cases import (
    CASES,
    CONTEXT,
    QUANTIZED,
    with_accuracy_level,
)
from tests.oracles.traced import difference

FLOAT = 2e-4  # of the range of the logits
FUNCTIONS = (dialect.TANH, dialect.RELU, dialect.EXP, dialect.SOFTPLUS)


@pytest.mark.parametrize(("recipe", "name"), [*(("fp32", name) for name in CASES), *QUANTIZED])
def test_graphs_are_lifted_whole(lower, name, recipe):
    made = lower(name, recipe)
    reading = read_graphs(made.folder, graphs_of(made.folder), CONTEXT)
    nodes = Counter(node.target for node in made.source.program.graph.nodes)
    for entry in reading.entry_points:
        assert entry.outside == ()
        values = list(lifted(entry.logits, {}).values())
        kinds = Counter(type(value) for value in values)
        assert Unknown not in kinds, [v for v in values if isinstance(v, Unknown)]
        wanted = {
            Bias: nodes[dialect.BIAS],
            Norm: nodes[dialect.RMS_NORM],
            LayerNorm: nodes[dialect.LAYER_NORM],
            Gelu: nodes[dialect.GELU],
            Silu: nodes[dialect.SILU],
            Scaled: nodes[dialect.SCALE],
            Softcap: nodes[dialect.SOFTCAP],
            Clamp: nodes[dialect.CLAMP],
            ShortConv: nodes[dialect.SHORT_CONV],
            Attention: nodes[dialect.ATTENTION],
            Rope: nodes[dialect.ROPE],
            Linear: nodes[dialect.LINEAR] + nodes[dialect.QUANT_LINEAR],
            Sum: nodes[dialect.ADD],
            Product: nodes[dialect.MUL],
            Sigmoid: nodes[dialect.SIGMOID],
            Route: nodes[dialect.ROUTE],
            RouteSparseMixer: nodes[dialect.ROUTE_SPARSE_MIXER],
            ChosenTokens: nodes[dialect.CHOSEN],
            ChosenSlots: nodes[dialect.CHOSEN_SLOTS],
            Combine: nodes[dialect.COMBINE],
            Slots: nodes[dialect.SLOTS],
            Recurrence: nodes[dialect.RECURRENCE],
            Previous: nodes[dialect.TOKEN_SHIFT],
            Gain: nodes[dialect.GAIN],
            UnitNorm: nodes[dialect.L2_NORM],
            Function: sum(nodes[f] for f in FUNCTIONS),
        }
        assert {kind: kinds[kind] for kind in wanted} == wanted
        for value in values:
            check_lifted(value, made, entry.probes)


def one(graph: onnx.GraphProto, op: str, among: str = "") -> onnx.NodeProto:
    """The first node of an operator whose result's name contains a text."""
    return next(n for n in graph.node if n.op_type == op and among in n.output[0])


def attribute(graph: onnx.GraphProto, op: str, name: str) -> onnx.AttributeProto:
    return attribute_of(one(graph, op), name)


def attribute_of(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(each for each in node.attribute if each.name == name)


def kernel(graph: onnx.GraphProto, branch: str) -> onnx.NodeProto:
    """The first recurrence's node in one of its branches."""
    return attribute_of(one(graph, "If"), branch).g.node[-1]


def swap_inputs_at(node: onnx.NodeProto, names: list[str]) -> None:
    node.input[1:3] = names


def set_number(graph: onnx.GraphProto, name: str, value) -> None:
    tensor = next(each for each in graph.initializer if each.name == name)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(value, dtype), name))


def swap_inputs(node: onnx.NodeProto, first: int, second: int) -> None:
    node.input[first], node.input[second] = node.input[second], node.input[first]


ALTERED = {
    "another softcap of scores": (
        "gemma",
        lambda g: setattr(attribute(g, "GroupQueryAttention", "softcap"), "f", 4.0),
    ),
    "another scale": (
        "scales",
        lambda g: setattr(attribute(g, "GroupQueryAttention", "scale"), "f", 0.2),
    ),
    "another factor": ("scales", lambda g: set_number(g, "number_0.22", 0.23)),
    "two factors for one": (
        "softcaps",
        lambda g: one(g, "Mul", "softcap").input.__setitem__(1, "one_more"),
    ),
    "another GELU": (
        "gelu-tanh",
        lambda g: setattr(attribute(g, "Gelu", "approximate"), "s", b"none"),
    ),
    "a bound on one side": ("clip", lambda g: set_number(g, "number_0.8", 0.9)),
    "another epsilon": (
        "layer-norm",
        lambda g: setattr(attribute(g, "LayerNormalization", "epsilon"), "f", 1e-6),
    ),
    "a shift for a scale": (
        "layer-norm",
        lambda g: swap_inputs(one(g, "LayerNormalization"), 1, 2),
    ),
    "another bias": (
        "biases",
        lambda g: one(g, "MatMulNBits").input.__setitem__(
            5, "model.layers.1.self_attn.qk_proj.bias"
        ),
    ),
    "a state that is never zeros": (
        "short-conv",
        lambda g: one(g, "LessOrEqual").CopyFrom(
            onnx.helper.make_node("Identity", ["first_is_attended"], ["row_begins"])
        ),
    ),
    "a state one token late": ("short-conv", lambda g: set_number(g, "steps_2", [1, 2])),
    "a memory that is never zeros": (
        "mamba",
        lambda g: kernel(g, "then_branch").input.__setitem__(3, kernel(g, "else_branch").input[3]),
    ),
    "a memory of another layer": (
        "delta-net",
        lambda g: kernel(g, "else_branch").input.__setitem__(
            3, "past_key_values.2.recurrent_state"
        ),
    ),
    "queries for keys in later calls": (
        "mamba",
        lambda g: swap_inputs(kernel(g, "else_branch"), 0, 1),
    ),
    "a recurrence without its bonus": (
        "rwkv5",
        lambda g: one(g, "Add", "recurrence").input.__setitem__(1, "one_more"),
    ),
    "the other shift's token": (
        "rwkv6",
        lambda g: swap_inputs_at(one(g, "Slice", "token_shift"), ["from_1", "to_2"]),
    ),
    "shifts exchanged in their state": (
        "rwkv6",
        lambda g: swap_inputs(one(g, "Concat", "layer_0_recent"), 0, 1),
    ),
    "another function": ("mamba", lambda g: setattr(one(g, "Softplus"), "op_type", "Relu")),
    "another length of keys": (
        "delta-net",
        lambda g: setattr(attribute_of(one(g, "RMSNormalization", "l2"), "epsilon"), "f", 1e-5),
    ),
    "taps in another order": ("short-conv", lambda g: swap_inputs_of(g, "tap_0", "tap_1")),
    "a shift by another step": (
        "short-conv",
        lambda g: one(g, "Slice", "shifted_1").input.__setitem__(1, "from_0"),
    ),
}


def swap_inputs_of(graph: onnx.GraphProto, first: str, second: str) -> None:
    """Exchanges what two nodes read as their second operand."""
    a, b = (
        next(n for n in graph.node if n.op_type == "Mul" and n.input[1].endswith(each))
        for each in (first, second)
    )
    a.input[1], b.input[1] = b.input[1], a.input[1]


def facts(folder: Path) -> list[str]:
    """What the lifted values say, without what they are named."""
    told = []
    for entry in read_graphs(folder, [folder / "model.onnx"], CONTEXT).entry_points:
        for value in lifted(entry.logits, {}).values():
            inner = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "name"}
            own = [(key, repr(each)) for key, each in inner.items() if not holds_values(each)]
            told.append(f"{type(value).__name__} {own}")
    return sorted(told)


def holds_values(found: object) -> bool:
    return isinstance(found, Value) or (
        isinstance(found, tuple) and any(isinstance(each, Value) for each in found)
    )


@pytest.mark.parametrize("edit", ALTERED)
def test_an_altered_graph_is_not_lifted_as_the_spec_says(lower, tmp_path, edit):
    name, alter = ALTERED[edit]
    made = lower(name, "int4-g32")
    folder = tmp_path / "altered"
    shutil.copytree(made.folder, folder)
    before = facts(folder)
    assert before == facts(made.folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    number = onnx.numpy_helper.from_array(np.array(3.5, np.float32), "one_more")
    model.graph.initializer.append(number)
    alter(model.graph)
    onnx.save(model, folder / "model.onnx")
    assert facts(folder) != before


def test_a_bias_beside_columns_that_stay_float(lower, case_text, tmp_path):
    source = lower("biases", "int4-g32").source
    columns = {f"model.layers.{i}.mlp.down_proj.weight": (3, 40) for i in (0, 1)}
    lowered = source.write(OnnxTarget(), tmp_path / "made", float_columns=columns)
    assert lowered.float_columns == {**columns, "lm_head.weight": ALL}  # a small head keeps all
    wanted = lower("biases", "int4-g32").reference.logits(case_text)
    exact = OnnxSession(with_accuracy_level(tmp_path / "made", tmp_path / "exact", 1), CONTEXT, 1)
    assert difference(exact.logits(case_text), wanted) < FLOAT
    for entry in read_graphs(tmp_path / "made", graphs_of(tmp_path / "made"), CONTEXT).entry_points:
        biased = [v for v in lifted(entry.logits, {}).values() if isinstance(v, Bias)]
        found = {v.source.weight.name: v.source.float_columns for v in biased}
        assert {name: kept for name, kept in found.items() if kept} == columns
        assert len(found) == 10
