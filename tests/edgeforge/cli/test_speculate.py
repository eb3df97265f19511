"""`export --draft-positions`, `export --exit-layer` and `run --speculate`, as a user types them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge import api
from edgeforge.errors import UsageError
from edgeforge.export_options import check_drafts
from edgeforge.model.model import open_model
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.meaning.check import check_meaning
from edgeforge.verification.references import reopen
from exporters.manifest import Manifest
from exporters.options import TargetOptions


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("speculate")


@pytest.fixture(scope="module")
def source(root) -> Path:
    return synthesise("tiny-llama", root / "checkpoint")


def made(root, source, name, **asked) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        return api.export(source, root / name, recipe="fp32", context=64, **asked)[0]


@pytest.fixture(scope="module")
def artifact(root, source) -> Path:
    return made(root, source, "whole", draft_positions=4)


@pytest.fixture(scope="module")
def smaller(root, source) -> Path:
    return made(root, source, "smaller", exit_layer=1)


def test_run_speculates_and_says_what_that_brought(edgeforge, artifact, smaller):
    prompt = ("run", artifact, "-p", "abcabcabc abc", "-n", "24")
    plain = edgeforge(*prompt)
    lookup = edgeforge(*prompt, "--speculate", "lookup", "--draft", "3", "--ngram", "2")
    model = edgeforge(*prompt, "--speculate", smaller)
    assert plain.code == lookup.code == model.code == 0
    assert plain.out == lookup.out == model.out
    for shown in (lookup, model):
        assert re.search(
            r"\n\[speculation: \d\.\d\d tokens a step, \d+ of \d+ proposed tokens accepted; "
            r"[\d.]+ times as fast as plain decoding, [\d.]+ tokens/s.*\]\n$",
            shown.err,
        )
    drawn = ("--temperature", "2", "--seed", "3", "--json")
    texts = [
        json.loads(edgeforge(*prompt, *drawn, *given).out)
        for given in ((), ("--speculate", "lookup"))
    ]
    assert texts[0]["tokens"] == texts[1]["tokens"]
    assert texts[0]["speculation"] is None
    told = texts[1]["speculation"]
    assert told["steps"] > 0 and told["accepted"] <= told["proposed"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--draft", "2"), "--draft belongs to --speculate: give that too, or leave it out"),
        (("--speculate", "nowhere"), "--speculate nowhere is neither lookup nor the folder of an"),
        (("--speculate", "lookup", "--draft", "4"), "--draft 4 is not possible: "),
        (("--speculate", "lookup", "--ngram", "99"), "--ngram 99 must be between 1 and 16"),
    ],
)
def test_run_refuses_in_one_sentence(edgeforge, artifact, given, words):
    shown = edgeforge("run", artifact, "-p", "a", *given)
    assert shown.code == 2 and shown.out == ""
    assert shown.err.startswith(f"edgeforge: {words}") and shown.err.count("\n") == 1


def test_run_refuses_an_artifact_without_drafts(edgeforge, smaller):
    shown = edgeforge("run", smaller, "-p", "a", "--speculate", "lookup")
    assert shown.code == 2
    assert "has no graph for drafts: export the model with --draft-positions 8" in shown.err


def test_one_position_is_what_every_artifact_gives(root, source):
    one = made(root, source, "one", draft_positions=1)
    none = made(root, source, "none")
    for path in none.rglob("*"):
        if path.is_file():
            assert (one / path.relative_to(none)).read_bytes() == path.read_bytes()
    assert len(list(one.rglob("*"))) == len(list(none.rglob("*")))


def test_a_cut_model_says_so_everywhere(edgeforge, smaller, source):
    manifest = Manifest.read(smaller)
    layers = len(reopen(manifest, str(source)).spec.layers) + 1
    assert (manifest.model.exit_layer, manifest.model.checkpoint_layers) == (1, layers)
    assert Manifest.read(smaller) == manifest
    shown = edgeforge("inspect", smaller)
    assert shown.code == 0 and f"\ncut after layer 1 of {layers}\n" in shown.out
    assert f"the model is cut after layer 1 of {layers}" in shown.out
    card = (smaller / "CARD.md").read_text()
    assert f"| cut after layer | 1 of {layers} |" in card
    assert json.loads((smaller / "card.json").read_text())["exit_layer"] == 1
    # What it computes is held against the cut checkpoint, and not against the whole one.
    checks = check_meaning(smaller, manifest, reopen(manifest, str(source)))
    assert {check.verdict for check in checks} == {"passed"}
    whole = check_meaning(smaller, manifest, open_model(str(source)))
    assert "meaning.layers" in [check.name for check in whole if check.verdict == "failed"]


def test_verify_holds_a_cut_model_against_the_cut_checkpoint(edgeforge, root, smaller, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
    shown = edgeforge("verify", smaller, "--tokens", "128", "--no-timed", "-q")
    assert "FLOAT is the checkpoint as it was, cut after layer 1 as the artifact is." in shown.out
    report = json.loads((smaller / "report.json").read_text())
    assert report["exit_layer"] == 1 and report["lowering"]["kl_mean"] < 1e-6


def test_drafts_are_on_the_card_and_in_inspect(edgeforge, artifact):
    card = (artifact / "CARD.md").read_text()
    assert "### Speculative decoding" in card and "`draft.onnx`" in card
    assert "the last 4 tokens of a call" in card and "a draft of up to 3 tokens" in card
    assert "| drafts | logits of 4 positions a call |" in card
    shown = edgeforge("inspect", artifact)
    assert "\ndrafts: the logits of 4 positions a call\n" in shown.out
    assert "draft.onnx logits: float[batch_size, draft_length, " in shown.out


def test_verify_runs_drafts_as_speculation_does(edgeforge, root, artifact, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
    shown = edgeforge("verify", artifact, "--tokens", "128", "--no-timed", "-q", "--json")
    (report,) = json.loads(shown.out)
    assert report["shipped"]["kl_max"] < 1e-6
    (fact,) = [check for check in report["checks"] if check["name"] == "meaning.draft"]
    assert fact["verdict"] == "passed" and "logits of 4 positions" in fact["message"]


@pytest.mark.parametrize("layer", [2, 99])
def test_export_and_plan_refuse_a_layer_that_is_not_there(edgeforge, source, tmp_path, layer):
    for command in (
        ("export", source, "--out", tmp_path / "out", "-q"),
        ("plan", source, "--device", "iphone-15-pro"),
    ):
        shown = edgeforge(*command, "--exit-layer", layer)
        assert shown.code == 2 and shown.err.count("\n") == 1
        assert f"--exit-layer {layer} is not possible: this model has " in shown.err


def test_a_model_that_cannot_take_tokens_back_gets_no_graph_for_drafts(source):
    spec = open_model(str(source)).spec
    check_drafts(spec, TargetOptions(draft_positions=4))
    layers = (replace(spec.layers[0], mixer="short_conv"), *spec.layers[1:])
    convolves = replace(spec, model_type="lfm2", layers=layers)
    check_drafts(convolves, TargetOptions())
    with pytest.raises(UsageError, match="--draft-positions is not possible: layers of this lfm2"):
        check_drafts(convolves, TargetOptions(draft_positions=4))
