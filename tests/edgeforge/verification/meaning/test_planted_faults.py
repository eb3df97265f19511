"""Every planted fault is named, on every target, from the files alone; a sound export is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeforge.verification.meaning.check import check_meaning
from edgeforge.verification.stored_weights import unlike_store
from exporters.registry import TARGETS
from quant.formats.formats import IntFormat
from tests.edgeforge.verification.meaning.conftest import Captures
from tests.planted_faults.table import FAULTS, VOCABULARY_FAULTS, other_weights
from tests.planted_faults.written import Fault, write_faulty

NAMES = [*(fault.name for fault in FAULTS), "weights"]
# What the message of a fault must say.
WORDS = {
    "rope-theta": "rope theta is 500000 in the tables, not 10000",
    "rope-64": "from position 64 on",
    "window-16": "has a window of 16 tokens, not no window",
    "window-64-shipped": "has a window of 64 tokens, not no window",
    "eps": "adds 0.01, not 1e-05",
    "gate-up": "layer 0: SiLU is applied to up",
    "norm": "layer 1: post_attention_layernorm is missing",
    "tokenizer": "tokenizer.json is not the checkpoint's",
    "eos": "eos is [256] in the files and [257] in the checkpoint",
    "rope-sets": "longrope's short factors are stored, not its long ones",
}


def _fault(name: str, captures: Captures, target: str) -> Fault:
    if name == "weights":
        return other_weights(captures("another")[target])
    return next(fault for fault in FAULTS if fault.name == name)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_each_fault_is_named(name, target, captures, tmp_path):
    fault = _fault(name, captures, target)
    captured = captures("longrope" if name == "rope-sets" else "llama")[target]
    assert fault.fits(captured)
    folder = tmp_path / "artifact"
    manifest = write_faulty(captured, fault, folder, tmp_path / "apart")

    checks = check_meaning(folder, manifest, captured.run.model)
    failed = {check.name: check for check in checks if check.verdict == "failed"}
    if fault.fact:
        assert fault.fact in failed, [check.message for check in failed.values()]
        assert failed[fault.fact].where
        assert WORDS.get(name, "") in failed[fault.fact].message
    else:
        assert not failed
    unlike = unlike_store(manifest, captured.made.store)
    assert bool(unlike) is fault.weights


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("config", ["llama", "longrope"])
def test_a_sound_artifact_has_no_fault(config, target, captures, tmp_path):
    captured = captures(config)[target]
    folder = tmp_path / "artifact"
    manifest = write_faulty(captured, None, folder, tmp_path / "apart")
    checks = check_meaning(folder, manifest, captured.run.model)
    assert [check.message for check in checks if check.verdict != "passed"] == []
    assert not unlike_store(manifest, captured.made.store)


@pytest.mark.parametrize("target", TARGETS)
def test_one_nibble_is_attributed_to_its_weight(target, captures, tmp_path):
    captured = captures("llama")[target]
    fault = _fault("nibble", captures, target)
    manifest = write_faulty(captured, fault, tmp_path / "artifact", tmp_path / "apart")
    (name,) = unlike_store(manifest, captured.made.store)
    format = captured.made.store.plan.weights[name].format
    assert isinstance(format, IntFormat) and format.bits == 4


@pytest.mark.parametrize(
    ("target", "shipped", "other"),
    [
        ("onnx", {"model.onnx"}, {"verify.onnx"}),
        ("coreml", {"decode", "prefill"}, {"verify"}),
        ("executorch", {"forward"}, {"logits_all"}),
    ],
)
def test_a_fault_of_the_shipped_graph_alone_is_found_there_alone(
    target, shipped, other, captures, tmp_path
):
    fault, captured = _fault("rope-64", captures, target), captures("llama")[target]
    folder = tmp_path / "artifact"
    manifest = write_faulty(captured, fault, folder, tmp_path / "apart")
    (found,) = [
        check
        for check in check_meaning(folder, manifest, captured.run.model)
        if check.verdict == "failed"
    ]
    assert found.name == "meaning.rope_tables"
    assert set(found.where) == shipped
    assert not set(found.where) & other


VOCABULARY_WORDS = {
    "bias": "layer 1: model.layers.1.mlp.down_proj.bias is not added to the feed-forward part's",
    "window-of-a-layer": "layer 0 has a window of 24 tokens, not a window of 8 tokens",
    "attention-softcap": "layer 0 bounds scores by 0, not by 50",
    "logit-softcap": "has no softcap of 30 on the result",
    "rotation": "layer 1, queries are rotated, which the checkpoint does not do",
    "multiplier": "has no factor of 2 on the embedding",
    "state": "does not ignore 3.recent where 0 tokens come before",
}
# Every fault on one target; on the others those that their lowering writes in ways of its own.
PLACES = [
    *((fault.name, "onnx") for fault in VOCABULARY_FAULTS),
    *((name, "coreml") for name in ("window-of-a-layer", "attention-softcap", "rotation")),
    *((name, "executorch") for name in ("bias", "window-of-a-layer", "logit-softcap")),
]


@pytest.mark.parametrize(("name", "target"), PLACES)
def test_each_fault_in_what_some_families_have_is_named(name, target, captures, tmp_path):
    fault = next(fault for fault in VOCABULARY_FAULTS if fault.name == name)
    captured = captures("vocabulary")[target]
    folder = tmp_path / "artifact"
    manifest = write_faulty(captured, fault, folder, tmp_path / "apart")
    checks = check_meaning(folder, manifest, captured.run.model)
    failed = {check.name: check.message for check in checks if check.verdict == "failed"}
    assert VOCABULARY_WORDS[name] in failed[fault.fact], failed


@pytest.mark.parametrize("target", TARGETS)
def test_what_some_families_have_is_read_and_held(target, captures, tmp_path):
    captured = captures("vocabulary")[target]
    folder = tmp_path / "artifact"
    manifest = write_faulty(captured, None, folder, tmp_path / "apart")
    checks = check_meaning(folder, manifest, captured.run.model)
    assert [check.message for check in checks if check.verdict != "passed"] == []
    wanted = ("biases", "bias_weights", "convolution_weights", "states", "clip_qkv")
    assert {f"meaning.{name}" for name in wanted} <= {c.name for c in checks}


def test_folders_of_faults_are_apart(captures, tmp_path):
    """A fault changes a copy of the weight store: the store of the cache stays sound."""
    captured = captures("llama")["onnx"]
    before = dict(captured.made.store.digests)
    write_faulty(captured, _fault("nibbles-10", captures, "onnx"), tmp_path / "a", tmp_path / "b")
    captured.made.store.check()
    assert dict(captured.made.store.digests) == before
    assert Path(tmp_path / "b" / "store").is_dir()
