"""What ships is scored as an app runs it: a graph that only apps run cannot be wrong unseen."""

from __future__ import annotations

import json
from dataclasses import replace
from shutil import copytree

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from device_harness.registry import open_session
from edgeforge import api
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.soundness import UnsoundError
from edgeforge.verification.verify import verify, verify_together
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest, record_files

CONTEXT = 96
TARGETS = ["onnx", "coreml", "executorch"]
OPTIONS = VerifyOptions(tokens=400, timed=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One checkpoint for all targets, and for each without the graph of all positions."""
    folder = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder / "cache"))
        checkpoint = synthesise("tiny-llama", folder / "model")
        common = {"targets": TARGETS, "recipe": "int8", "context": CONTEXT, "chunk": "16"}
        whole = api.export(checkpoint, folder / "whole", **common)
        stripped = api.export(checkpoint, folder / "stripped", **common, strip=True)
        yield whole, stripped


@pytest.fixture(scope="module")
def found(made):
    whole, stripped = made
    return verify_together(whole, OPTIONS), verify_together(stripped, OPTIONS)


def verdicts(evaluation) -> dict[str, str]:
    return {each.name: each.verdict for each in evaluation.checks}


def rehashed(folder):
    """The files' digests as an exporter with a fault would record them."""
    manifest = Manifest.read(folder)
    replace(manifest, files=record_files(folder)).write(folder)
    return folder


def edited(source, folder, graphs, edit):
    """A copy of an ONNX artifact with some of its graphs edited."""
    copytree(source, folder)
    for name in graphs:
        graph = onnx.load(folder / name, load_external_data=False)
        edit(graph.graph, folder)
        onnx.save(graph, folder / name)
    return rehashed(folder)


def narrow_window(graph, folder):
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            node.attribute.append(helper.make_attribute("local_window_size", 16))


def rotary_wrong_from_64(graph, folder):
    for table in graph.initializer:
        if table.name in ("rope_cos", "rope_sin"):
            rows = numpy_helper.to_array(table, base_dir=str(folder)).copy()
            rows[64:] = rows[64:][::-1]
            table.CopyFrom(numpy_helper.from_array(rows, table.name))


@pytest.mark.parametrize("index", range(3), ids=TARGETS)
def test_sound_artifacts_are_run_to_the_last_position(found, index):
    evaluation = found[0][index]
    shipped = evaluation.shipped
    assert "failed" not in verdicts(evaluation).values()
    assert shipped.context == shipped.reached == CONTEXT and shipped.unreached == ""
    assert shipped.prefill.tokens > 3 and shipped.decode.tokens > 10
    # As much as the graph of all positions diverges, which is at work in the volume.
    assert shipped.kl_mean < 3 * evaluation.lowering.kl_mean
    assert shipped.all_positions.tokens == shipped.positions
    assert shipped.all_positions.kl_max < 1e-3
    report = json.loads(json.dumps(evaluation.to_json()))
    assert report["shipped"]["decode"]["tokens"] == shipped.decode.tokens


@pytest.mark.parametrize("index", range(3), ids=TARGETS)
def test_a_stripped_artifact_loses_nothing(found, index):
    whole, stripped = found[0][index].shipped, found[1][index].shipped
    assert stripped.all_positions is None and stripped.furthest == ()
    assert stripped.positions == whole.positions and stripped.passes == whole.passes
    assert stripped.kl_mean == pytest.approx(whole.kl_mean, rel=0.2, abs=1e-7)
    names = verdicts(found[1][index]).keys()
    assert verdicts(found[0][index]).keys() - names == {"shipped.difference"}


@pytest.mark.parametrize("index", range(3), ids=TARGETS)
def test_a_session_says_how_it_is_driven(made, index):
    whole, stripped = made
    for folder, expected in ((whole[index], True), (stripped[index], False)):
        with open_session(folder, Manifest.read(folder)) as session:
            assert session.has_all_positions is expected
            assert (16 in session.chunks) == (TARGETS[index] == "coreml")


@pytest.mark.parametrize("edit", [narrow_window, rotary_wrong_from_64])
def test_a_fault_in_what_ships_alone_fails(made, tmp_path, edit):
    folder = edited(made[0][0], tmp_path / "faulty", ["model.onnx"], edit)
    with pytest.raises(UnsoundError, match=r"shipped\.kl_mean is .* must be at most") as caught:
        verify(folder, OPTIONS)
    (evaluation,) = caught.value.evaluations
    found = verdicts(evaluation)
    assert found["lowering.kl_mean"] == "passed"  # the graph of all positions is as it was
    assert found["shipped.difference"] == "failed"
    assert all(int(each.split()[1]) >= 16 for each in evaluation.shipped.worst)
    assert "position" in str(caught.value)


def test_a_fault_in_both_graphs_fails_too(made, tmp_path):
    graphs = ["model.onnx", "verify.onnx"]
    folder = edited(made[0][0], tmp_path / "faulty", graphs, rotary_wrong_from_64)
    with pytest.raises(UnsoundError, match=r"kl_max is .* \(worst: position 6[4-9] "):
        verify(folder, OPTIONS)


def test_logits_of_what_ships_that_are_not_finite_fail(made, tmp_path):
    def overflow(graph, folder):
        for table in graph.initializer:
            if table.name == "rope_cos":
                rows = numpy_helper.to_array(table, base_dir=str(folder)).copy()
                rows[80:] = np.inf
                table.CopyFrom(numpy_helper.from_array(rows, table.name))

    folder = edited(made[0][0], tmp_path / "faulty", ["model.onnx"], overflow)
    with pytest.raises(UnsoundError, match="what ships gives NaN or infinite logits at") as caught:
        verify(folder, OPTIONS)
    (evaluation,) = caught.value.evaluations
    assert evaluation.shipped.not_finite > 0 and evaluation.not_finite == {}
    failed = {name for name, verdict in verdicts(evaluation).items() if verdict == "failed"}
    assert failed == {"non_finite", "meaning.rope_tables"}


def test_the_users_bound_decides(made):
    tight = replace(OPTIONS, bounds={"lowering.kl_mean": 1e-9, "total.top1_agreement": 0.0})
    with pytest.raises(UnsoundError, match=r"at most 1e-09 \(worst: token \d+ of block") as caught:
        verify(made[0][0], tight)
    (evaluation,) = caught.value.evaluations
    assert verdicts(evaluation)["total.top1_agreement"] == "passed"
    loose = replace(OPTIONS, bounds={"lowering.kl_mean": 10.0})
    assert verdicts(verify(made[0][0], loose))["lowering.kl_mean"] == "passed"
