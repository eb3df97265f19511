"""Mixtures of experts: which experts run, long texts, options, and what an altered file says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_harness.onnx_session import OnnxSession
from edgeforge.reference.walk import store_reader
from exporters.lifted import Unknown
from exporters.lifted_mixture import Combine
from exporters.onnx.lifted import read_graphs
from exporters.onnx.target import OnnxTarget, graphs_of
from exporters.options import TargetOptions
from quant.formats.activations import TOKEN
from tests.exporters.onnx.vocabulary_cases import CASES, CONTEXT, with_accuracy_level
from tests.oracles.lowered_spec import LoweredSpec
from tests.oracles.traced import ReferenceSession, difference

FLOAT = 2e-4  # of the range of the logits
MIXTURES = [name for name in CASES if name.startswith(("mixture", "heads"))]
# The experts whose rows the first router of a case chooses: where they are in a layer, their
# matrices, how many there are, and how many a token has.
FIRST = {
    "mixture": ("mlp", ("gate_up", "down"), 8, 2),
    "heads-and-mixture": ("self_attn", ("q", "o"), 4, 2),
}


def chosen_by(folder: Path, token: int) -> set[int]:
    """The experts that a text of one token chose in the first layer."""
    name = next(
        output
        for node in onnx.load(folder / "verify.onnx", load_external_data=False).graph.node
        for output in node.output
        if output.endswith("_experts")
    )
    shown = OnnxSession(folder, CONTEXT, 1).values([np.array([token])], [name])
    return {int(expert) for expert in shown[0][name][0].ravel()}


def poison(source: Path, folder: Path, name: str, experts: Collection[int]) -> Path:
    """A copy of an artifact in which experts of the first layer have no finite number."""
    shutil.copytree(source, folder)
    at, parts, _, _ = FIRST[name]
    wanted = {
        f"model.layers.0.{at}.experts.{expert}.{part}_proj.weight{suffix}"
        for expert in experts
        for part in parts
        for suffix in ("", ".scale_bf16")
    }
    model, found = onnx.load(folder / "model.onnx", load_external_data=False), 0
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            found += 1
            tensor.raw_data = b"\xff" * (np.dtype("f4").itemsize * np.prod(tensor.dims))
            if tensor.data_type == onnx.TensorProto.BFLOAT16:
                tensor.raw_data = tensor.raw_data[::2]
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    assert found == 2 * len(experts)
    onnx.save(model, folder / "model.onnx")
    return folder


def check_skipped(made: Path, name: str, scratch: Path) -> None:
    token = np.array([5])
    chosen, (_, _, count, own) = chosen_by(made, 5), FIRST[name]
    others = set(range(count)) - chosen
    assert len(chosen) == own
    wanted = OnnxSession(made, CONTEXT, 1).extend(token)
    finite = poison(made, scratch / "others", name, others)
    for threads in (1, 2):
        assert (OnnxSession(finite, CONTEXT, threads).extend(token) == wanted).all()
    for expert in chosen:
        broken = poison(made, scratch / f"{expert}", name, {expert})
        assert not np.isfinite(OnnxSession(broken, CONTEXT, 1).extend(token)).any()


@pytest.mark.parametrize("recipe", ["fp32", "int4-g32", "int8"])
@pytest.mark.parametrize("name", FIRST)
def test_experts_that_no_token_chose_do_not_run(lower, tmp_path, name, recipe):
    check_skipped(lower(name, recipe).folder, name, tmp_path)


@pytest.mark.parametrize("name", FIRST)
def test_texts_of_a_thousand_tokens(tmp_path, name):
    spec = replace(CASES[name].spec(), max_context=1024)
    source = LoweredSpec(spec, tmp_path / "store", "fp32", 1024)
    source.write(OnnxTarget(), tmp_path / "artifact", options=TargetOptions(strip=True))
    text = np.random.default_rng(2).integers(0, spec.vocab_size, 1001)
    wanted = ReferenceSession(source.program, store_reader(source.store)).logits(text)
    session = OnnxSession(tmp_path / "artifact", 1024, 2)
    assert difference(session.extend(text[:1000]), wanted[999]) < FLOAT
    assert difference(session.extend(text[1000:]), wanted[1000]) < FLOAT


@pytest.mark.parametrize("name", FIRST)
def test_products_of_rounded_activations(case_text, tmp_path, name):
    """The program rounds them itself, so that the graph computes with the same integers."""
    spec = CASES[name].spec()
    source = LoweredSpec(spec, tmp_path / "store", "int8", CONTEXT, TOKEN)
    folder = tmp_path / "artifact"
    source.write(OnnxTarget(), folder)
    wanted = ReferenceSession(source.program, store_reader(source.store)).logits(case_text)
    session = OnnxSession(folder, CONTEXT, 1)
    rows = np.abs(session.logits(case_text) - wanted).max(1) / np.ptp(wanted)
    assert np.median(rows) < FLOAT and rows.max() < 0.02  # the kernels round a few values otherwise
    assert difference(session.extend(case_text[:1]), wanted[0]) < FLOAT
    assert OnnxTarget().stored_digests(folder) == source.store.digests
    for entry in read_graphs(folder, graphs_of(folder), CONTEXT).entry_points:
        assert unknown(entry.logits) == []
    check_skipped(folder, name, tmp_path)


@pytest.mark.parametrize("name", FIRST)
def test_columns_that_stay_float_and_drafts(lower, case_text, tmp_path, name):
    made, folder = lower(name, "int4-g32"), tmp_path / "artifact"
    at, (first, second), count, _ = FIRST[name]
    expert = f"model.layers.0.{at}.experts.{{}}.{{}}_proj.weight"
    columns = {expert.format(0, first): (3, 40), expert.format(count - 1, second): (1,)}
    drafts = TargetOptions(draft_positions=4)
    lowered = made.source.write(OnnxTarget(), folder, float_columns=columns, options=drafts)
    assert {name: lowered.float_columns[name] for name in columns} == columns
    wanted = made.reference.logits(case_text)
    session = OnnxSession(with_accuracy_level(folder, tmp_path / "exact", 1), CONTEXT, 1)
    assert difference(session.logits(case_text), wanted) < FLOAT
    assert difference(session.extend(case_text[:9]), wanted[8]) < FLOAT
    session.use_drafts(True)
    session.extend(case_text[:9])
    assert difference(session.extend_draft(case_text[9:12]), wanted[9:12]) < 0.04
    for entry in read_graphs(folder, graphs_of(folder), CONTEXT).entry_points:
        assert unknown(entry.logits) == []


@pytest.mark.parametrize("name", ["mixture", "heads"])
def test_int8_caches(lower, case_text, tmp_path, name):
    made, folder = lower(name), tmp_path / "artifact"
    caches = [given.name for _, given in made.source.program.placeholders("cache")]
    ranges = {name: np.full((2, 16), 16.0, np.float32) for name in caches}
    options = TargetOptions(kv_cache="int8")
    made.source.write(OnnxTarget(), folder, cache_ranges=ranges, options=options)
    wanted = made.reference.logits(case_text)
    assert difference(OnnxSession(folder, CONTEXT, 1).logits(case_text), wanted) < 0.02


@pytest.mark.parametrize("recipe", ["fp32", "int4-g32"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_files_hold_the_stores_numbers(lower, name, recipe):
    made = lower(name, recipe)
    assert OnnxTarget().stored_digests(made.folder) == made.source.store.digests


def unknown(logits) -> list[str]:
    """The kinds of what the reader did not recognise, in what logits are computed from."""
    found, waiting, seen = [], [logits], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting.extend(value)
        elif hasattr(value, "name") and id(value) not in seen and hasattr(value, "__dict__"):
            seen.add(id(value))
            if isinstance(value, Unknown):
                found.append(value.kind)
            if hasattr(value, "__dataclass_fields__"):
                waiting.extend(getattr(value, each.name) for each in fields(value))
    return found


def named(graph: onnx.GraphProto, end: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.output[-1].endswith(end))


def swap_results(graph: onnx.GraphProto) -> None:
    inputs = named(graph, "_results").input
    inputs[0], inputs[1] = inputs[1], inputs[0]


def swap_rows(graph: onnx.GraphProto) -> None:
    outputs = next(n for n in graph.node if n.output[0].endswith("_rows_0")).output
    outputs[2], outputs[3] = outputs[3], outputs[2]


def smallest(graph: onnx.GraphProto) -> None:
    attributes = named(graph, "_experts").attribute
    next(each for each in attributes if each.name == "largest").i = 0


def not_restored(graph: onnx.GraphProto) -> None:
    node = named(graph, "_sorted")
    node.input[1] = node.input[1].replace("_places", "_order")


def undivided(graph: onnx.GraphProto) -> None:
    node = named(graph, "_factors")
    node.input[0] = node.input[0].replace("_shares", "_kept")


def other_tokens(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "Div" and "_tokens" in node.name)
    node.input[1] = "one"


ALTERED = [swap_results, swap_rows, smallest, not_restored, undivided, other_tokens]


@pytest.mark.parametrize("alter", ALTERED, ids=lambda alter: alter.__name__)
def test_an_altered_mixture_is_not_lifted_as_one(
    lower, tmp_path, alter: Callable[[onnx.GraphProto], None]
):
    folder = tmp_path / "artifact"
    shutil.copytree(lower("mixture").folder, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    alter(model.graph)
    onnx.save(model, folder / "model.onnx")
    (reading,) = read_graphs(folder, [folder / "model.onnx"], CONTEXT).entry_points
    assert unknown(reading.logits) or swapped(reading.logits)


def swapped(logits) -> bool:
    """Whether some term of a sum is not of the expert whose weight multiplies it."""
    waiting, seen = [logits], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting.extend(value)
            continue
        if id(value) in seen or not hasattr(value, "__dataclass_fields__"):
            continue
        seen.add(id(value))
        if isinstance(value, Combine):
            for expert, result in value.terms:
                if hasattr(result, "weight") and f".experts.{expert}." not in result.weight.name:
                    return True
        waiting.extend(getattr(value, each.name) for each in fields(value))
    return False
