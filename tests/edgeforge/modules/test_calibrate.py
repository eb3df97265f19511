"""GPTQ on linear layers of a module, calibrated on given inputs, against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgeforge.errors import UsageError
from edgeforge.modules.calibrate import Calibration
from edgeforge.modules.export import export
from edgeforge.modules.options import ModuleOptions
from edgeforge.modules.plan import plan_of, quantize
from edgeforge.modules.samples import samples_of
from edgeforge.modules.trace import trace
from edgeforge.stage_progress import no_progress
from exporters.modules.integer_program import values_of
from exporters.modules.manifest import ModuleManifest
from exporters.modules.registry import MODULE_TARGETS
from quant.quantizers.gptq import Gptq

ROWS = torch.export.Dim("rows", max=4096)


class Net(nn.Module):
    """A convolution, and two linear layers whose inputs depend on each other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 12, 3, padding=1)
        self.first, self.second = nn.Linear(12 * 16, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(torch.relu(self.first(torch.relu(self.conv(x)).flatten(1))))


def drawn(count, seed):
    """Smooth curves: neighbouring points are alike, as in recorded signals."""
    draw = np.random.default_rng(seed)
    steps = np.linspace(0, 2 * np.pi, 16)
    waves = draw.normal(size=(count, 1, 1)) * np.sin(steps + draw.uniform(0, 6, (count, 1, 1)))
    return {"x": (waves + 0.05 * draw.normal(size=waves.shape)).astype(np.float32)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def traced():
    return trace(Net(), torch.from_numpy(drawn(4, 1)["x"]), {"x": {0: ROWS}})


def calls(count, seed):
    return [{"x": torch.from_numpy(drawn(count, seed)["x"])}]


def errors(traced, recipe, tmp_path):
    calibration = Calibration(calls(512, 2))
    store = quantize(traced, plan_of(traced, recipe), 1, no_progress, calibration)
    (sample,) = samples_of(traced, store, [drawn(512, 3)])
    difference = sample.quantized["output"] - sample.floats["output"]
    return float(np.sqrt((difference**2).mean())), store


@pytest.mark.parametrize("format", ["int8-pc", "int4-g32"])
def test_it_is_closer_than_rounding_to_nearest_on_other_inputs(traced, tmp_path, format):
    found = {}
    for algorithm in ("rtn", "gptq"):
        rules = tmp_path / f"{algorithm}.yaml"
        rules.write_text(f"- {{match: '*', format: {format}, algorithm: {algorithm}}}\n")
        found[algorithm], store = errors(traced, str(rules), tmp_path)
        algorithms = {name: each.algorithm for name, each in store.plan.weights.items()}
        assert algorithms["first.weight"] == algorithm and algorithms["conv.weight"] == "rtn"
    assert found["gptq"] < 0.8 * found["rtn"]


def test_a_layer_is_given_what_enters_it_behind_quantized_layers(traced):
    """The codes are GPTQ's own, of inputs that torch computes."""
    plan = plan_of(traced, "int4-g128-gptq")
    assert plan.weights["second.weight"].format.name == "int8-pc", "64 columns are no group of 128"
    _, store = errors(traced, "int4-gptq", None)
    net = Net()
    (call,) = calls(512, 2)
    with torch.no_grad():
        for name in ("conv.weight", "first.weight"):
            value = values_of(store, traced.weights[name])
            net.get_submodule(name.partition(".")[0]).weight.copy_(value)
        x = torch.relu(net.first(torch.relu(net.conv(call["x"])).flatten(1))).double()
    given = store.plan.weights["second.weight"]
    made = Gptq("gptq-descent", activation_order=True, sweeps=2).quantize_matrix(
        Net().second.weight.detach(), x.T @ x / len(x), given.format
    )
    same = (store.part("second.weight", "codes") == made.codes).float().mean()
    assert given.algorithm == "gptq-descent" and same > 0.97  # sums in float32 and float64


@pytest.mark.artifact
def test_what_it_was_calibrated_on_is_said(tmp_path):
    example = torch.from_numpy(drawn(4, 1)["x"])
    for number, (options, words) in enumerate(
        (
            ({}, "2 linear layers were calibrated on the example inputs alone, which verify runs"),
            ({"inputs": [drawn(4, 5)]}, "on one call, which verify runs, too: give others with"),
            ({"calibration": [drawn(4, 5), drawn(4, 6)]}, "were calibrated on 2 calls"),
        )
    ):
        (folder,) = export(
            Net(),
            example,
            None,
            [MODULE_TARGETS["onnx"]],
            tmp_path / str(number),
            ModuleOptions(recipe="int4-gptq", **options),
        )
        notes = ModuleManifest.read(folder).notes
        assert any(words in note for note in notes)
        assert any(
            "1 weights of convolutions and embeddings were rounded" in note for note in notes
        )


def test_inputs_that_are_not_finite(traced):
    plan = plan_of(traced, "int4-gptq")
    call = {"x": torch.full((2, 1, 16), float("nan"))}
    with pytest.raises(UsageError, match=r"the inputs of first.weight are not finite"):
        quantize(traced, plan, 1, no_progress, Calibration([call]))
