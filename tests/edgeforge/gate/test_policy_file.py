"""Policies as files: what they say, and what no policy can say."""

from __future__ import annotations

import pytest

from edgeforge.errors import UsageError
from edgeforge.gate.policy import Subject
from edgeforge.gate.policy_file import read_policy

WHOLE = """
version: 1
artifacts: [out/*]
baseline: baseline.json
text: held.txt
tokens: 4096
bounds:
  total.kl_mean: {at_most: 0.05}
  size.bytes: {at_most: 100MB}
worse_by:
  total.kl_mean: 0.02
allow:
  meaning.window: the app never passes 512 tokens
rules:
  - match: {target: coreml, recipe: int4*}
    bounds:
      total.kl_mean: {at_most: 0.08}
  - match: {model: demo}
    tokens: all
    decode_ratio: {against: out/reference, at_least: 0.9}
"""


def written(tmp_path, text):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return path


def test_a_later_rule_overrides_what_stands_above_it(tmp_path):
    policy = read_policy(written(tmp_path, WHOLE))
    onnx = policy.terms_for(Subject("out/a", "onnx", "int4-gptq", ("llama",)))
    coreml = policy.terms_for(Subject("out/b", "coreml", "int4-gptq", ("demo",)))
    assert onnx.bounds["total.kl_mean"].at_most == 0.05
    assert coreml.bounds["total.kl_mean"].at_most == 0.08
    assert coreml.bounds["total.kl_mean"].source == "rule 1 (target coreml, recipe int4*)"
    assert coreml.bounds["size.bytes"].at_most == 100e6
    assert (onnx.tokens, coreml.tokens) == (4096, "all")
    assert (onnx.ratios, list(coreml.ratios)) == ({}, ["decode_ratio"])
    assert coreml.ratios["decode_ratio"].against == tmp_path / "out/reference"
    assert policy.baseline == tmp_path / "baseline.json"
    assert onnx.text == tmp_path / "held.txt"
    assert onnx.worse_by == {"total.kl_mean": 0.02}
    assert onnx.allow == {"meaning.window": "the app never passes 512 tokens"}


def test_patterns_choose_by_path_model_target_and_recipe(tmp_path):
    text = "version: 1\nrules:\n"
    for match in ("path: out/*", "model: Smol*", "target: onnx", "recipe: '*gptq'"):
        text += f"  - match: {{{match}}}\n"
    rules = read_policy(written(tmp_path, text)).rules
    one = Subject("out/chat", "onnx", "int4-gptq", ("hub/SmolLM2", "SmolLM2"))
    other = Subject("elsewhere", "coreml", "int8", ("demo",))
    assert [rule.chooses(one) for rule in rules] == [True] * 4
    assert [rule.chooses(other) for rule in rules] == [False] * 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("version: 1\nbound: {}", "no key 'bound' .did you mean 'bounds'"),
        ("version: 1\nbounds: {total.kl_maen: {at_most: 1}}", "did you mean 'total.kl_mean'"),
        ("version: 1\nbounds: {total.kl_mean: {at_mots: 1}}", "did you mean 'at_most'"),
        ("version: 1\nrules: [{match: {tagret: onnx}}]", "did you mean 'target'"),
        ("version: 1\nrules: [{match: {target: onxx}}]", "did you mean 'onnx'"),
        ("version: 1\nworse_by: {total.kl_maen: 0.1}", "did you mean 'total.kl_mean'"),
        (
            "version: 1\nbounds: {total.kl_mean: {at_most: 0.1, at_least: 0.2}}",
            "total.kl_mean must be at most 0.1 and at least 0.2, which nothing can be",
        ),
        (
            "version: 1\nbounds: {total.top1_agreement: {at_least: 1.5}}",
            "'1.5', but it is a share of at most 1",
        ),
        ("version: 1\nbounds: {total.kl_mean: {at_least: 0.1}}", "better the smaller it is"),
        ("version: 1\nbounds: {total.kl_mean: {at_most: -1}}", "not a number of 0 or more"),
        ("version: 1\nbounds: {total.kl_mean: {at_most: nan}}", "not a number of 0 or more"),
        ("version: 1\nbounds: {size.bytes: {at_most: big}}", "'big' is not a size"),
        ("version: 1\nbounds: 3", "bounds is '3', not a mapping"),
        ("version: 1\ntokens: few", "neither a number of tokens"),
        ("version: 1\ndecode_ratio: {at_least: 0.9}", "decode_ratio has no against"),
        ("version: 1\nallow: {meaning.window: ''}", "meaning.window needs a reason in words"),
        ("version: 1\nallow: {total.kl_mean: it is fine}", "give it a bound under bounds"),
        ("version: 1\nallow: {files: it is fine}", "files cannot be allowed"),
        ("version: 1\nrules: [{bounds: {}}]", "rule 1 has no match"),
        ("version: 1\nrules: [{match: {}}]", "match is empty"),
        ("version: 1\nrules: 3", "rules is '3', not a list"),
        ("version: 2", "version is '2'; this EdgeForge reads policies of version 1"),
        ("bounds: {}", "write 'version: 1'"),
        ("- 1", "not a mapping"),
        ("version: 1\nversion: 1", "the key 'version' occurs twice"),
        ("a: [", "is not YAML"),
        ("a: *b", "is an alias"),
    ],
)
def test_what_no_policy_can_say_is_one_sentence(tmp_path, text, sentence):
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=sentence) as caught:
        read_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rules_that_contradict_each_other_are_refused_for_what_both_choose(tmp_path):
    policy = read_policy(
        written(
            tmp_path,
            "version: 1\nbounds: {perplexity_ratio: {at_most: 1.1}}\nrules:\n"
            "  - match: {target: onnx}\n"
            "    bounds: {perplexity_ratio: {at_most: 1.3, at_least: 1.2}}\n"
            "  - match: {recipe: int8}\n    bounds: {perplexity_ratio: {at_most: 1.05}}\n",
        )
    )
    assert policy.terms_for(Subject("a", "onnx", "int4", ())).bounds["perplexity_ratio"].at_least
    with pytest.raises(UsageError, match=r"for a: perplexity_ratio must be at most 1\.05 and"):
        policy.terms_for(Subject("a", "onnx", "int8", ()))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_policy_that_cannot_be_read_is_refused(tmp_path, make):
    make(tmp_path / "policy.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_policy(tmp_path / "policy.yaml")
