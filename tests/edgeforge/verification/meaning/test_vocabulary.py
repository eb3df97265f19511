"""Every word of the vocabulary is held against the spec; a fault in one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeforge.families.spec import ModelSpec
from edgeforge.verification.meaning.chains import NoDecoderError
from edgeforge.verification.meaning.decoder import decoder_of
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.layers import Layers
from edgeforge.verification.meaning.rotary import Rotary
from exporters.lifted import EntryPoint
from quant.program import dialect
from tests.oracles.vocabulary import CONTEXT, LAYERS, SPECS
from tests.oracles.vocabulary_models import program_of
from tests.planted_faults import programs
from tests.planted_faults.lifted_program import lifted_program


def held(spec: ModelSpec, entry: EntryPoint) -> tuple[dict[str, str], set[str]]:
    """The facts that are otherwise with their messages, and those that are as they must be."""
    findings = Findings()
    layers = Layers(spec, CONTEXT, 1, Rotary(spec.ropes, CONTEXT), findings)
    findings.fact("structure", "")
    try:
        layers.hold(entry, decoder_of(entry.logits))
    except NoDecoderError as error:
        findings.same(error.fact, False, entry.name, str(error))
    checks = findings.checks()
    failed = {c.name.removeprefix("meaning."): c.message for c in checks if c.verdict == "failed"}
    passed = {c.name.removeprefix("meaning.") for c in checks if c.verdict == "passed"}
    return failed, passed


@pytest.mark.parametrize("name", SPECS)
def test_a_sound_program_has_no_fault(name):
    failed, passed = held(SPECS[name], lifted_program(program_of(SPECS[name])))
    assert failed == {}
    if name == "everything":
        words = {"biases", "attention_softcap", "logit_softcap", "clip_qkv", "states", "caches"}
        assert (
            words | {f"{each}_multiplier" for each in ("embedding", "residual", "logit")} < passed
        )


FAULTS = {
    "bias": (
        "everything",
        lambda p: programs.without(p, dialect.BIAS, "model.layers.1.mlp.down_proj.bias"),
        "biases",
        "layer 1: model.layers.1.mlp.down_proj.bias is not added",
    ),
    "bias of the head": (
        "everything",
        lambda p: programs.without(p, dialect.BIAS, "lm_head.bias"),
        "biases",
        "lm_head.bias is not added to the result",
    ),
    "window": (
        "everything",
        lambda p: programs.with_window(p, 24, layer=0),
        "window",
        "layer 0 has a window of 24 tokens, not a window of 8 tokens",
    ),
    "no window": (
        "everything",
        lambda p: programs.with_window(p, 0, layer=0),
        "window",
        "layer 0 has no window, not a window of 8 tokens",
    ),
    "attention's softcap": (
        "everything",
        lambda p: programs.with_attention(p, softcap=0.0),
        "attention_softcap",
        "layer 0 bounds scores by 0, not by 50",
    ),
    "logits' softcap": (
        "sandwich",
        lambda p: programs.without(p, dialect.SOFTCAP),
        "logit_softcap",
        "all has no softcap of 30 on the result",
    ),
    "scale of scores": (
        "everything",
        lambda p: programs.with_attention(p, scale=8.0**-0.5),
        "attention",
        "multiplies scores by 0.353553, not 0.3",
    ),
    "no bound": (
        "unscaled",
        lambda p: programs.without(p, dialect.CLAMP),
        "clip_qkv",
        "layer 0 has no bound of 8 on queries",
    ),
    "multiplier": (
        "everything",
        lambda p: programs.with_factor(p, 0.2, 0.25),
        "residual_multiplier",
        "layer 0 has a factor of 0.25 on the first part's result, not 0.2",
    ),
    "no multiplier": (
        "everything",
        lambda p: programs.without_factor(p, 2.0),
        "embedding_multiplier",
        "all has no factor of 2 on the embedding",
    ),
    "rotation where none must be": (
        "everything",
        lambda p: programs.with_rotation(p, layer=1),
        "rope_type",
        "layer 1, queries are rotated, which the checkpoint does not do",
    ),
    "no rotation": (
        "everything",
        lambda p: programs.without_rotation(p, layer=2),
        "rope_type",
        "layer 2, queries are not rotated",
    ),
    "another layer's rotation": (
        "everything",
        lambda p: programs.with_tables_of(p, layer=2, other="_1"),
        "rope_tables",
        "all, layer 2: tables of [64, 2], not [64, 4]",
    ),
    "the queries' rotation": (
        "queries-own",
        lambda p: programs.with_tables_of(p, layer=0, other=""),
        "rope_tables",
        "all, layer 0: tables of [64, 4], not [64, 2]",
    ),
    "norm": (
        "sandwich",
        lambda p: programs.without_norm(p, "model.layers.1.mlp_output_norm.weight"),
        "norms",
        "layer 1: mlp_output_norm is missing",
    ),
    "LayerNorm's shift": (
        "parallel",
        lambda p: programs.without_shift(p, "model.layers.1.input_layernorm.bias"),
        "biases",
        "layer 1: input_layernorm has the bias None, not model.layers.1.input_layernorm.bias",
    ),
    "RMSNorm": (
        "unscaled",
        lambda p: p,
        "norms",
        "the last norm is a LayerNorm",
        {"norm": "rms"},
    ),
    "GELU": (
        "parallel",
        lambda p: p,
        "activation",
        "the activation function GELU, not GELU by a tanh",
        {"activation": "gelu_tanh"},
    ),
    "block": (
        "plain",
        lambda p: p,
        "block",
        "the feed-forward part reads the residual stream after the layer's first part",
        {"block": "parallel"},
    ),
    "mixer": (
        "convolutions",
        lambda p: p,
        "layers",
        "layer 0 mixes tokens by a short convolution, not by attention",
        {"layers": LAYERS[:2]},
    ),
    "one state for two layers": (
        "everything",
        lambda p: programs.with_shared_state(p, 3, 4),
        "states",
        "layer 4 reads 3.recent as its 4.recent",
    ),
    "a factor too many": (
        "everything",
        lambda p: p,
        "factors",
        "all has a factor of 2 on the embedding, which the checkpoint has not",
        {"embedding_multiplier": 1.0},
    ),
    "a bound too many": (
        "unscaled",
        lambda p: p,
        "bounds",
        "a bound of 8 on queries, which the checkpoint has not",
        {"clip_qkv": 0.0},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    name, change, fact, words, *fields = FAULTS[fault]
    spec = replace(SPECS[name], **fields[0]) if fields else SPECS[name]
    failed, _ = held(spec, lifted_program(change(program_of(SPECS[name]))))
    assert words in failed[fact], failed


def test_a_state_that_a_text_does_not_begin_without_is_named():
    entry = lifted_program(program_of(SPECS["everything"]))
    (one, _) = decoder_of(entry.logits).convolutions()
    object.__setattr__(one, "recent", replace(one.recent, ignored=(False,) * len(entry.probes)))
    failed, _ = held(SPECS["everything"], entry)
    assert set(failed) == {"states"}
    assert "does not ignore 3.recent where 0 tokens come before" in failed["states"]


def test_a_file_that_does_not_say_how_a_text_begins_is_doubtful():
    entry = lifted_program(program_of(SPECS["everything"]))
    for each in decoder_of(entry.logits).convolutions():
        object.__setattr__(each, "recent", replace(each.recent, ignored=None))
    findings = Findings()
    spec = SPECS["everything"]
    Layers(spec, CONTEXT, 1, Rotary(spec.ropes, CONTEXT), findings).hold(
        entry, decoder_of(entry.logits)
    )
    (unread,) = [check for check in findings.checks() if check.verdict != "passed"]
    assert "whether all begins a text with empty states" in unread.message
