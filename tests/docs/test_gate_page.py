"""The policy and the workflow that the page on the gate shows, used as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.gate.gate import GateOptions, check
from edgeforge.gate.metrics import BENCH_RATIOS, FIGURES, RATIOS
from edgeforge.gate.policy_file import read_policy
from edgeforge.synth.synthesise import synthesise
from quant.yaml_input import parse_yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gate.md").read_text("utf-8")
BLOCKS = {
    body.split("\n", 1)[0].removeprefix("# "): body
    for body in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A repository as the page's policy expects it."""
    root = tmp_path_factory.mktemp("gate-page")
    (root / "edgeforge-policy.yaml").write_text(BLOCKS["edgeforge-policy.yaml"], "utf-8")
    (root / "eval").mkdir()
    text = (ROOT / "edgeforge" / "demo" / "heldout.txt").read_text("utf-8")
    (root / "eval" / "conversations.txt").write_text(text[:4_000], "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        checkpoint = synthesise("tiny-llama", root / "model")
        for place, recipe in (("out/chat/onnx", "int8"), ("out/search/onnx", "int4-g32")):
            (root / place).parent.mkdir(parents=True)
            api.export(checkpoint, root / place, recipe=recipe, context=64)
        yield root


def test_the_policy_holds_what_it_says(build):
    policy = build / "edgeforge-policy.yaml"
    asked = {"policy": policy, "timed": False}
    first = check([], GateOptions(update_baseline=True, **asked))
    assert not first.violations
    assert first.baseline_updated
    again = check([], GateOptions(**asked))
    assert again.passed
    chat, search = again.artifacts
    assert (chat.path, search.path) == ("out/chat/onnx", "out/search/onnx")
    held = {e.metric: e for e in chat.findings if e.kind == "bound"}
    assert {"total.kl_mean", "size.bytes", "size.growth"} <= held.keys()
    assert held["size.growth"].value == 1.0
    (kl,) = (e for e in search.findings if (e.metric, e.kind) == ("total.kl_mean", "bound"))
    assert (kl.limit, kl.source) == (0.3, "rule 2 (recipe int4*)")
    assert {e.metric for e in chat.findings if e.kind == "baseline"} >= {"perplexity_ratio"}
    rule = read_policy(policy).rules[0]
    assert rule.terms.ratios["decode_ratio"].against == build / "out" / "search" / "onnx"


def test_the_page_names_every_figure_and_key():
    for name in (*FIGURES, *RATIOS, *BENCH_RATIOS, "worse_by", "allow", "checkpoint"):
        assert f"`{name}`" in PAGE, name


def test_the_policy_of_devices_is_one(tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text(BLOCKS["devices.yaml"], "utf-8")
    terms = read_policy(path).terms
    assert terms.ratios["bench.decode_ratio"].device == "android*"
    assert terms.bounds["device.lowering.top1_agreement"].at_least == 0.98


def test_the_workflow_uses_the_action_as_it_is():
    workflow = parse_yaml(BLOCKS[".github/workflows/models.yml"].encode())
    action = parse_yaml((ROOT / "action.yml").read_bytes())
    steps = workflow["jobs"]["gate"]["steps"]
    (used,) = (step for step in steps if "OWNER/edgeforge" in step.get("uses", ""))
    assert used["with"].keys() <= action["inputs"].keys()
    outputs = set(re.findall(r"steps\.gate\.outputs\.(\w+)", str(steps)))
    assert outputs <= action["outputs"].keys()
    written = [each["default"] for name, each in action["inputs"].items() if name != "extras"]
    for file in ("edgeforge-check.sarif", "edgeforge-check.xml"):
        assert file in written and file in str(steps)
    for name in action["inputs"]:
        assert f"`{name}`" in PAGE, name


def test_the_hook_is_the_one_that_the_page_names():
    config = parse_yaml(BLOCKS[".pre-commit-config.yaml"].encode())
    (named,) = (hook["id"] for repo in config["repos"] for hook in repo["hooks"])
    hooks = parse_yaml((ROOT / ".pre-commit-hooks.yaml").read_bytes())
    assert named in {hook["id"] for hook in hooks}
