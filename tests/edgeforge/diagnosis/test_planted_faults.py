"""`diagnose` names the layer of every planted fault that changes what all positions compute."""

from __future__ import annotations

import pytest

from edgeforge.diagnosis.diagnose import DiagnoseOptions, advice, diagnose
from edgeforge.diagnosis.points import Point
from exporters.registry import TARGETS
from tests.planted_faults.table import FAULTS, other_weights
from tests.planted_faults.written import write_faulty

FIRST, AFTER = Point(0, "attention"), Point(0, "layer")
# The first point that each fault changes.
PLACES = {
    "rope-theta": FIRST,
    "window-16": FIRST,
    "eps": FIRST,
    "gate-up": AFTER,
    "scales": FIRST,
    "nibbles-10": FIRST,
    "weights": FIRST,
    "norm": Point(1, "layer"),
}
OPTIONS = DiagnoseOptions(tokens=100, weights=False, threads=1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PLACES)
def test_the_layer_of_a_fault_is_named(name, target, captures, tmp_path):
    captured = captures("llama")[target]
    if name == "weights":
        fault = other_weights(captures("another")[target])
    else:
        fault = next(each for each in FAULTS if each.name == name)
    folder = tmp_path / "artifact"
    write_faulty(captured, fault, folder, tmp_path / "apart")
    found = diagnose(folder, OPTIONS)
    shown = [each.point for each in found.noise if each.lowering is not None]
    if PLACES[name] not in shown:
        # ExecuTorch's last delegate hides the last layer's stream, and says so.
        assert target == "executorch" and str(PLACES[name]) in found.unshown[0]
        return
    assert found.leaves == PLACES[name], [(str(e.point), e.lowering) for e in found.noise]
    assert f"at {PLACES[name]}:" in advice(found)[0]


@pytest.mark.parametrize("target", ["coreml", "executorch"])
def test_caches_of_two_layers_that_are_swapped_are_told_or_placed(target, captures, tmp_path):
    """In ONNX the caches are inputs and outputs, so this fault shows only from call to call."""
    fault = next(each for each in FAULTS if each.name == "caches")
    folder = tmp_path / "artifact"
    write_faulty(captures("llama")[target], fault, folder, tmp_path / "apart")
    found = diagnose(folder, OPTIONS)
    assert found.leaves is not None or any("not the decoder" in why for why in found.unshown)
