"""Every operator gives its torch meaning in ExecuTorch's runtime, and is read back as itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeforge.families.spec import LayerSpec
from edgeforge.verification.meaning.decoder import decoder_of
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.layers import Layers
from edgeforge.verification.meaning.rotary import Rotary
from exporters.errors import ExportError
from exporters.executorch import state, target
from exporters.executorch.lifted import read_program
from exporters.executorch.reader import stored_digests
from exporters.lifted import ShortConv, Value
from tests.exporters.executorch.small_programs import Made, make
from tests.oracles.lowered_spec import SpecWeights
from tests.oracles.vocabulary import FACTORS, FULL, HEADS, MIXTURES, SPECS, VOCAB, small_spec

CONTEXT = 48
CLOSE = 2e-5
CONV = LayerSpec(0, 0, FULL.ffn_width, mixer="short_conv")
ONE = (FULL,)
WORDS = {
    **SPECS,
    **MIXTURES,
    "biases": small_spec(ONE, biased=True, tied=False),
    "layer norm": small_spec(ONE, norm="layer", shifted=True),
    "layer norm alone": small_spec(ONE, norm="layer", scaled=False),
    "gelu": small_spec(ONE, activation="gelu"),
    "gelu by a tanh": small_spec(ONE, activation="gelu_tanh", gated=False),
    "factors": small_spec(
        ONE, embedding_multiplier=2.5, residual_multiplier=0.3, logit_multiplier=0.125
    ),
    "softcap": small_spec(ONE, logit_softcap=1.5),
    "clamp": small_spec(ONE, clip_qkv=0.5),
    "scale": small_spec(ONE, attention_scale=0.9),
    "norms over all heads": small_spec(ONE, qk_norm=-1),
    "capped": small_spec((replace(FULL, window=7), FULL), attention_softcap=1.5),
    "capped, a head for each": small_spec((LayerSpec(4, 4, 40),), attention_softcap=1.5),
    "capped, one head for all": small_spec((LayerSpec(4, 1, 40),), attention_softcap=1.5),
    "convolution before attention": small_spec((CONV, FULL)),
    "capped heads": small_spec(
        (HEADS, FULL, HEADS), router="normalized_softmax", attention_softcap=1.5
    ),
}


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, "CHUNK_TOKENS", 16)
        yield


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(7).integers(0, VOCAB, CONTEXT, dtype=np.int64)


def error(found, wanted) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.ptp(wanted))


def faults(made: Made) -> list[str]:
    """What of the written methods is otherwise than the spec says."""
    findings = Findings()
    layers = Layers(made.spec, CONTEXT, 1, Rotary(made.spec.ropes, CONTEXT), findings)
    reading = read_program(made.folder / "model.pte", CONTEXT)
    for entry in reading.entry_points:
        assert entry.outside == ()
        layers.hold(entry, decoder_of(entry.logits))
    return [check.message for check in findings.checks() if check.verdict == "failed"]


@pytest.mark.parametrize("name", WORDS)
def test_the_runtime_gives_what_torch_gives(name, run_pte, text, tmp_path):
    made = make(WORDS[name], tmp_path)
    wanted = made.logits(text)
    with run_pte(made.folder) as session:
        assert error(session.logits(text), wanted) < CLOSE
        at = 0
        for size in (21, 9, 1, 1, 15, 1):
            at += size
            assert error(session.extend(text[at - size : at]), wanted[at - 1]) < CLOSE
            if size == 9:  # another text in between leaves the states as they were
                session.logits(text[::-1][:11].copy())
        session.reset()
        assert error(session.extend(text[:5]), wanted[4]) < CLOSE
    assert faults(made) == []
    assert stored_digests(made.folder / "model.pte") == dict(made.store.digests)


KEPT = {"model.layers.0.mlp.gate_up_proj.weight": (1, 5), "lm_head.weight": "all"}


@pytest.mark.parametrize("format", ["int4-g32", "int4-pc", "int8-pc"])
@pytest.mark.parametrize("kept", [{}, KEPT], ids=["rounded", "some kept"])
def test_biases_beside_integers(format, kept, run_pte, text, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "SMALL", 0)
    spec = small_spec(
        (replace(FULL, ffn_width=64), replace(CONV, ffn_width=64)), biased=True, tied=False
    )
    made = make(spec, tmp_path, format, float_columns=kept)
    wanted = made.logits(text, kept)
    with run_pte(made.folder) as session:
        found = session.logits(text)
    # Both round alike but where a number lies between two integers.
    assert np.median(np.abs(found - wanted)) < 1e-5 * np.ptp(wanted)
    assert error(found, wanted) < 0.02
    assert error(found, made.logits(text)) < 0.08
    assert faults(made) == []
    digests = dict(made.store.digests)
    assert stored_digests(made.folder / "model.pte") == digests


def test_int8_caches_beside_bounded_scores(run_pte, text, tmp_path):
    made = make(WORDS["capped"], tmp_path, kv_cache="int8")

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.edgeforge.round_per_token(x)

    wanted = made.logits(text, cached=rounded)
    with run_pte(made.folder) as session:
        every = session.logits(text)
        assert error(every, wanted) < 0.2 * error(every, made.logits(text))
        assert error(session.extend(text[:20]), every[19]) < CLOSE
        assert error(session.extend(text[20:21]), every[20]) < CLOSE
    assert faults(made) == []
    assert any("attention rounds keys and values" in note for note in made.lowered.notes)


@pytest.mark.parametrize("name", ["biases", "convolutions", "heads"])
def test_weights_in_a_file_of_their_own(name, run_pte, text, tmp_path):
    made = make(WORDS[name], tmp_path, weights="external")
    with run_pte(made.folder) as session:
        assert error(session.logits(text), made.logits(text)) < CLOSE
    assert stored_digests(made.folder / "model.pte") == dict(made.store.digests)


@pytest.mark.parametrize(
    "name", ["capped", "capped heads", "convolution before attention", "heads-and-mixture"]
)
def test_several_positions_of_a_run(name, run_pte, text, tmp_path):
    made = make(WORDS[name], tmp_path, draft_positions=3)
    wanted = made.logits(text)
    with run_pte(made.folder) as session:
        session.use_drafts(True)
        assert error(session.extend(text[:20]), wanted[19]) < CLOSE
        assert error(session.extend_draft(text[20:23]), wanted[20:23]) < CLOSE
        assert error(session.extend_draft(text[23:25]), wanted[23:25]) < CLOSE
    assert faults(made) == []


def test_a_text_begins_with_zeros_whatever_a_state_holds(run_pte, text, tmp_path):
    spec = small_spec((CONV, CONV), embedding_multiplier=2.0, tied=False)
    source = SpecWeights(spec)
    source.tensors["model.embed_tokens.weight"][0] = 3e38  # twice that is infinite
    made = make(spec, tmp_path, source=source)
    text = np.where(text == 0, 1, text)
    wanted = made.logits(text)
    with run_pte(made.folder) as session:
        assert not np.isfinite(session.extend(np.zeros(1, np.int64))).any()
        session.reset()
        assert error(session.extend(text[:20]), wanted[19]) < CLOSE


def test_the_manifest_says_what_runs_outside_of_delegates(tmp_path):
    capped, convolved = (make(WORDS[n], tmp_path / n) for n in ("capped", "convolutions"))
    assert any("bounds attention's scores" in note for note in capped.lowered.notes)
    assert any("cannot be taken back" in note for note in convolved.lowered.notes)
    states = convolved.lowered.states
    assert set(states.values()) == {"float32[1, 2, 32]"}
    assert list(states) == ["model.layers.0.conv.recent", "model.layers.1.conv.recent"]


@pytest.fixture(scope="module")
def convolved(tmp_path_factory):
    return make(small_spec((CONV,)), tmp_path_factory.mktemp("convolved"))


def found_in(value: Value, kind: type) -> list[Value]:
    """All values of a kind that a value is made of."""
    inner = [v for v in vars(value).values() if isinstance(v, Value)]
    inner += [v for given in vars(value).values() if isinstance(given, tuple) for v in given]
    own = [value] if isinstance(value, kind) else []
    return own + [f for v in inner if isinstance(v, Value) for f in found_in(v, kind)]


def test_a_convolutions_state_is_read_back(convolved):
    reading = read_program(convolved.folder / "model.pte", CONTEXT)
    for entry in reading.entry_points:
        (conv,) = {id(v): v for v in found_in(entry.logits, ShortConv)}.values()
        assert conv.recent.ignored == tuple(probe.start == 0 for probe in entry.probes)
        assert conv.recent.read == conv.recent.written
        stored = convolved.store.part("model.layers.0.conv.conv.weight", "value")
        np.testing.assert_array_equal(conv.values, stored.numpy())


def test_executorchs_own_exporter_takes_what_carries_no_state(run_pte, text, tmp_path):
    spec = small_spec(
        (replace(FULL, rope=None),),
        biased=True,
        tied=False,
        norm="layer",
        shifted=True,
        block="sandwich",
        activation="gelu_tanh",
        **{name: value for name, value in FACTORS.items() if name != "attention_softcap"},
    )
    made = make(spec, tmp_path, "int8-pc", lowering="stock", strip=True)
    wanted = made.logits(text, {})
    with run_pte(made.folder) as session:
        assert error(session.extend(text[:20]), wanted[19]) < 0.02
    assert target.ExecutorchTarget().stored_digests(made.folder) == made.store.digests


@pytest.mark.parametrize(
    ("name", "words"),
    [("convolutions", "short convolutions with a state"), ("capped", "with bounded scores")],
)
def test_executorchs_own_exporter_is_refused_other_operators(name, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        make(WORDS[name], tmp_path, lowering="stock")
