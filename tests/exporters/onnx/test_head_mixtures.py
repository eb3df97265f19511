"""Mixtures of attention heads: weights too small for float32, drafts, and altered files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_harness.onnx_session import OnnxSession
from edgeforge.reference.walk import store_reader
from exporters.lifted import Unknown
from exporters.onnx.lifted import read_graphs
from exporters.onnx.target import OnnxTarget
from exporters.options import TargetOptions
from tests.exporters.onnx.lifted_checks import check_lifted, lifted
from tests.exporters.onnx.vocabulary_cases import CASES, CONTEXT, Made
from tests.oracles import lowered_spec
from tests.oracles.traced import ReferenceSession, difference

FLOAT = 2e-4  # of the range of the logits
NAME = "heads-and-mixture"


class Decided(lowered_spec.SpecWeights):
    """Weights of routers so large that float32 cannot hold the shares of most chosen experts."""

    def __init__(self, *given) -> None:
        super().__init__(*given)
        for name, tensor in self.tensors.items():
            if name.endswith("router.weight"):
                self.tensors[name] = tensor * 300


@pytest.mark.parametrize("name", ["heads", NAME])
def test_weights_that_are_zero(tmp_path, case_text, monkeypatch, name):
    """A chosen expert whose weight is rounded to 0 fills a slot that no output reads."""
    monkeypatch.setattr(lowered_spec, "SpecWeights", Decided)
    source = lowered_spec.LoweredSpec(CASES[name].spec(), tmp_path / "store", "fp32", CONTEXT)
    source.write(OnnxTarget(), tmp_path / "artifact")
    wanted = ReferenceSession(source.program, store_reader(source.store)).logits(case_text)
    session = OnnxSession(tmp_path / "artifact", CONTEXT, 1)
    assert difference(session.logits(case_text), wanted) < FLOAT
    assert difference(session.extend(case_text[:20]), wanted[19]) < FLOAT
    graph = onnx.load(tmp_path / "artifact" / "verify.onnx", load_external_data=False).graph
    shares = next(o for node in graph.node for o in node.output if o.endswith("_shares"))
    (shown,) = session.values([case_text], [shares])
    assert (np.concatenate(shown[shares]) == 0).mean() > 0.2


def test_logits_of_drafts(lower, case_text, tmp_path):
    """The last layer's outputs are computed for the last few tokens, its queries for all."""
    made, folder = lower(NAME), tmp_path / "artifact"
    made.source.write(OnnxTarget(), folder, options=TargetOptions(draft_positions=4))
    wanted, session = made.reference.logits(case_text), OnnxSession(folder, CONTEXT, 1)
    session.use_drafts(True)
    at = 9
    assert difference(session.extend(case_text[:at]), wanted[at - 1]) < FLOAT
    for size in (3, 4, 1):
        given = case_text[at : at + size]
        assert difference(session.extend_draft(given), wanted[at : at + size]) < FLOAT
        at += size
    (entry,) = read_graphs(folder, [folder / "draft.onnx"], CONTEXT).entry_points
    assert is_right(entry.logits, made, entry.probes)


def is_right(logits, made: Made, probes) -> bool:
    """Whether everything that is lifted of a graph is what the spec says."""
    values = lifted(logits, {}).values()
    if any(isinstance(value, Unknown) for value in values):
        return False
    try:
        for value in values:
            check_lifted(value, made, probes)
    except (AssertionError, AttributeError):
        return False
    return True


def ending(graph: onnx.GraphProto, end: str, at: int = 0) -> onnx.NodeProto:
    """One of the nodes whose last result's name has an ending, from the first layer to the last."""
    return [node for node in graph.node if node.output[-1].endswith(end)][at]


def permute(graph: onnx.GraphProto, end: str, order: list[int]) -> None:
    ending(graph, end).attribute[0].ints[:] = order


def constant(graph: onnx.GraphProto, node: onnx.NodeProto, place: int, numbers: list[int]) -> None:
    """Gives a node another list of numbers."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), "altered"))
    node.input[place] = "altered"


def insert(graph: onnx.GraphProto, source: str, axis: int, reader: onnx.NodeProto) -> None:
    """Exchanges the two experts of each token in what a node reads."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 0]), "exchanged"))
    place = list(reader.input).index(source)
    made = onnx.helper.make_node("Gather", [source, "exchanged"], ["altered"], axis=axis)
    graph.node.insert(list(graph.node).index(reader), made)
    reader.input[place] = "altered"


def swap(node: onnx.NodeProto) -> None:
    node.input[0], node.input[1] = node.input[1], node.input[0]


def swap_slots(graph: onnx.GraphProto) -> None:
    split = next(
        node for node in graph.node if node.op_type == "Split" and is_of_slots(graph, node)
    )
    split.output[0], split.output[1] = split.output[1], split.output[0]


def is_of_slots(graph: onnx.GraphProto, split: onnx.NodeProto) -> bool:
    made = {name: node for node in graph.node for name in node.output}
    return split.input[0] in made and made[split.input[0]].input[0].endswith("_slots")


def exchange_before_attention(graph: onnx.GraphProto) -> None:
    reader = ending(graph, "_by_head")
    insert(graph, reader.input[0], 2, reader)


def exchange_after_attention(graph: onnx.GraphProto) -> None:
    reader = ending(graph, "_slots")
    insert(graph, reader.input[0], 1, reader)


def exchange_ids(graph: onnx.GraphProto) -> None:
    reader = ending(graph, "_ids")
    insert(graph, reader.input[0], -1, reader)


def slots_before_heads(graph: onnx.GraphProto) -> None:
    constant(graph, ending(graph, "_apart"), 1, [-1, 1, 4, 16])


def one_wide_head(graph: onnx.GraphProto) -> None:
    constant(graph, ending(graph, "_apart"), 1, [-1, 1, 2, 32])
    # All else as for two heads: the columns of a row are as many.


def heads_of_half_the_width(graph: onnx.GraphProto) -> None:
    shape = [n for n in graph.node if n.op_type == "Concat" and n.output[0].endswith("_shape")]
    constant(graph, next(node for node in shape if "slots" in node.output[0]), 1, [4, 8])


def columns_of_two_rows(graph: onnx.GraphProto) -> None:
    constant(graph, ending(graph, "_slots"), 1, [-1, 16])


def order_for_places(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.output[0].endswith("_sorted") and "slots" in n.name)
    node.input[1] = node.input[1].replace("_places", "_order")


def rows_by_token(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if n.op_type == "Gather" and n.input[0].endswith("_slots"))
    node.input[1] = next(n.output[0] for n in graph.node if n.output[0].endswith("_tokens"))


def order_of_the_layer_before(graph: onnx.GraphProto) -> None:
    """The second layer's outputs take all that says which experts are chosen from the first's."""
    names = [n.output[0].removesuffix("_shares") for n in graph.node if is_shares(n)]
    first, second = names[0], names[2]
    begin = next(
        n for n in graph.node if n.input and n.input[0] == ending(graph, "_slots", 1).output[0]
    )
    for node in list(graph.node)[list(graph.node).index(begin) :]:
        if node.output[0].startswith(("model", "combine")) or "combine" in node.name:
            for place, name in enumerate(node.input):
                if name.startswith(f"{second}_"):
                    node.input[place] = name.replace(second, first)


def is_shares(node: onnx.NodeProto) -> bool:
    return node.output[0].endswith("_shares") and node.op_type == "Div"


def order_alone_of_the_layer_before(graph: onnx.GraphProto) -> None:
    node = [n for n in graph.node if n.op_type == "Gather" and n.input[0].endswith("_slots")][1]
    names = [n.output[0].removesuffix("_shares") for n in graph.node if is_shares(n)]
    node.input[1] = f"{names[0]}_order"


def slots_of_all_tokens(graph: onnx.GraphProto) -> None:
    node, made = ending(graph, "_apart", -1), {n.output[0]: n for n in graph.node}
    assert made[node.input[0]].op_type == "GatherND"
    node.input[0] = made[node.input[0]].input[0]


def shares_of_all_tokens(graph: onnx.GraphProto) -> None:
    made = {n.output[0]: n for n in graph.node}
    node = next(n for n in graph.node if n.op_type == "Unsqueeze" and is_last(made, n.input[0]))
    node.input[0] = made[node.input[0]].input[0]


def is_last(made: dict[str, onnx.NodeProto], name: str) -> bool:
    return name.endswith("_shares") and made[name].op_type == "GatherND"


def other_rows(graph: onnx.GraphProto) -> None:
    """The last token's experts are those of the first token."""
    constant(graph, ending(graph, "_experts", -1), 1, [[[0]]])


ALTERED = {
    "swapped queries": lambda g: swap(next(n for n in g.node if n.output[0].endswith("_results"))),
    "swapped slots": swap_slots,
    "experts exchanged before attention": exchange_before_attention,
    "experts exchanged after attention": exchange_after_attention,
    "ids exchanged": exchange_ids,
    "heads of queries left in place": lambda g: permute(g, "_by_head", [0, 1, 2, 3, 4]),
    "heads of outputs left in place": lambda g: permute(g, "_by_slot", [0, 1, 2, 3]),
    "twice as many slots": slots_before_heads,
    "one wide head": one_wide_head,
    "heads of half the width": heads_of_half_the_width,
    "columns of two rows": columns_of_two_rows,
    "order for places": order_for_places,
    "rows by token": rows_by_token,
    "the order of another router": order_alone_of_the_layer_before,
    "the choice of another router": order_of_the_layer_before,
    "slots of all tokens": slots_of_all_tokens,
    "shares of all tokens": shares_of_all_tokens,
    "the experts of the first token": other_rows,
}


@pytest.mark.parametrize("edit", ALTERED)
def test_an_altered_mixture_of_heads_is_not_lifted_as_right(lower, tmp_path, edit):
    made, folder = lower(NAME), tmp_path / "artifact"
    shutil.copytree(made.folder, folder)
    assert reads_right(folder, made)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    before = model.SerializeToString(deterministic=True)
    alter: Callable[[onnx.GraphProto], None] = ALTERED[edit]
    alter(model.graph)
    assert model.SerializeToString(deterministic=True) != before
    onnx.save(model, folder / "model.onnx")
    assert not reads_right(folder, made)


def reads_right(folder: Path, made: Made) -> bool:
    (entry,) = read_graphs(folder, [folder / "model.onnx"], CONTEXT).entry_points
    return is_right(entry.logits, made, entry.probes)
