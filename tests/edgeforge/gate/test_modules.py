"""`check` on artifacts of modules: bounds of the policy, the baseline, and what is not for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from edgeforge import api, gate
from edgeforge.errors import UsageError
from edgeforge.gate.policy import Range, Terms
from edgeforge.gate.result import GateFailed
from edgeforge.gate.subjects import not_for_models

pytestmark = pytest.mark.artifact
SCHEMA = Path(gate.__file__).parent / "schemas" / "check-1.schema.json"
POLICY = """
version: 1
artifacts: [net]
baseline: baseline.json
bounds:
  module.cosine: {at_least: 0.9}
  size.growth: {at_most: 1.2}
"""


def export(out, recipe, seed=0, x=None):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    torch.manual_seed(1)
    x = torch.randn(4, 64) if x is None else x
    return api.export_module(net, x, out, recipe=recipe, force=True)[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("gated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        export(root / "int8", "int8")
        export(root / "int4", "int4")
        yield root


@pytest.fixture
def place(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported / "int8", "net")
    Path("edgeforge-policy.yaml").write_text(POLICY)
    return tmp_path


def test_a_worse_module_fails_against_the_baseline(place, exported, edgeforge):
    api.check(update_baseline=True)
    result = api.check()
    (artifact,) = result.artifacts
    assert artifact.measured_on == "2 samples" and not artifact.fresh and not result.notes
    kinds = {each.metric: each.kind for each in artifact.findings}
    assert kinds == {
        "module.lowering": "bound",
        "module.cosine": "bound",
        "size.growth": "bound",
        "module.total": "baseline",
    }
    shutil.rmtree("net")
    shutil.copytree(exported / "int4", "net")
    shown = edgeforge("check", "--json", "--markdown", "check.md", "-q")
    assert shown.code == 1
    data = json.loads(shown.out)
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    failed = [e for e in data["artifacts"][0]["findings"] if e["outcome"] == "failed"]
    assert [each["metric"] for each in failed] == ["module.total"]
    assert "(the recipe was int8 and is int4)" in failed[0]["message"]
    assert "| **failed** | `module.total` |" in Path("check.md").read_text()
    shown = edgeforge("check", "-q")
    assert shown.code == 1 and "on the same inputs, where +" in shown.out
    # What may get worse is the policy's to say.
    Path("edgeforge-policy.yaml").write_text(POLICY + "worse_by: {module.total: 1}\n")
    with pytest.raises(GateFailed, match=r"module\.total"):
        api.check()


def test_bounds_and_changed_files(place):
    Path("edgeforge-policy.yaml").write_text(
        "version: 1\nbounds: {module.total: {at_most: 1e-6}, total.kl_mean: {at_most: 1}}\n"
    )
    with pytest.raises(GateFailed, match=r"module\.total") as told:
        api.check("net")
    assert told.value.result.notes == (
        "net is of a module, for which total.kl_mean of the policy is not",
    )
    (finding,) = told.value.result.artifacts[0].failed
    assert finding.where == ("output output",)
    Path("net/model.onnx").write_bytes(b"other")
    with pytest.raises(GateFailed, match="files"):
        api.check("net")


def test_another_module_or_other_inputs_cannot_be_compared(place):
    api.check(update_baseline=True)
    for options, words in (
        ({"seed": 5}, "other weights of the module"),
        ({"x": torch.ones(4, 64)}, "other inputs .* seed what the factory draws"),
    ):
        export(Path("net"), "int8", **options)
        with pytest.raises(UsageError, match=words):
            api.check()


def test_figures_of_modules_are_not_for_language_models():
    terms = Terms(bounds={"module.total": Range(at_most=1.0), "total.kl_mean": Range(at_most=1.0)})
    assert not_for_models(terms) == ["module.total"]
