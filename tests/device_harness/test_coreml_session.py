"""Core ML artifacts in the interpreter: chunks, remainders, states, options, what is refused."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from device_harness import coreml_session
from device_harness.coreml_session import AppleRunner, CoremlSession, _AppleStates
from device_harness.errors import DeviceError
from device_harness.registry import open_session
from edgeforge import api
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest

CONTEXT = 64


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coreml")
    checkpoint = synthesise("tiny-llama", folder / "checkpoint")

    def export(name: str, recipe: str = "int4", **options: object) -> Path:
        if not (folder / name).exists():
            asked = {"targets": ["coreml"], "recipe": recipe, "context": CONTEXT, **options}
            api.export(checkpoint, folder / name, **asked)
        return folder / name

    return export


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, 40)


@pytest.fixture(scope="module")
def opened():
    """Opens artifacts, which stay open to the end of this file."""
    with ExitStack() as sessions:

        def opened(folder: Path, **options: str) -> CoremlSession:
            session = open_session(folder, Manifest.read(folder), 1, options)
            assert isinstance(session, CoremlSession)
            return sessions.enter_context(session)

        yield opened


@pytest.fixture(scope="module")
def wanted(opened, export, tokens):
    """Logits of every position, token by token."""
    session = opened(export("chunk16", chunk="16"), precision="fp32")
    return np.stack([session.extend(tokens[i : i + 1]) for i in range(len(tokens))])


def test_chunks_and_the_rest_give_what_single_tokens_give(opened, export, tokens, wanted):
    session = opened(export("chunk16", chunk="16"), precision="fp32")
    np.testing.assert_allclose(session.logits(tokens), wanted, atol=1e-4)  # 16 + 16 + 8 of one
    np.testing.assert_allclose(session.extend(tokens[:37]), wanted[36], atol=1e-4)
    np.testing.assert_allclose(session.extend(tokens[37:]), wanted[39], atol=1e-4)


def test_a_text_leaves_the_positions_of_another_alone(opened, export, tokens, wanted):
    session = opened(export("chunk16", chunk="16"), precision="fp32")
    session.extend(tokens[:20])
    session.logits(tokens[::-1].copy())
    np.testing.assert_allclose(session.extend(tokens[20:]), wanted[-1], atol=1e-4)
    session.reset()
    np.testing.assert_allclose(session.extend(tokens[:5]), wanted[4], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stripped", {"strip": True, "chunk": "16"}),
        ("enumerated", {"chunk": "4,16"}),
        ("onehot", {"chunk": "16", "cache_write": "onehot"}),
    ],
)
def test_other_forms_of_a_package(opened, export, tokens, wanted, name, options):
    session = opened(export(name, **options), precision="fp32")
    np.testing.assert_allclose(session.extend(tokens[:39]), wanted[38], atol=1e-4)
    np.testing.assert_allclose(session.logits(tokens), wanted, atol=1e-4)


def test_caches_that_are_inputs_and_outputs(opened, export, tokens):
    """iOS 17 has no states: one function takes the caches and gives them back."""
    new = opened(export("new", recipe="fp16", chunk="16"), precision="fp32")
    old = opened(export("old", recipe="fp16", opset="ios17", chunk="16"), precision="fp32")
    np.testing.assert_allclose(old.logits(tokens), new.logits(tokens), atol=1e-4)
    for part in (tokens[:18], tokens[18:]):
        np.testing.assert_allclose(old.extend(part), new.extend(part), atol=1e-4)


def test_what_ran_it_is_said(opened, export):
    session = opened(export("chunk16", chunk="16"))
    assert session.runtime == (
        "EdgeForge's interpreter of the Core ML package (fp16 rounding), not Apple's runtime"
    )
    assert any("compiler accepts the package" in limit for limit in session.limits)
    assert any("speed" in limit for limit in session.limits)


def test_tokens_and_options_that_are_refused(opened, export, tokens):
    folder = export("chunk16", chunk="16")
    session = opened(folder)
    for given, words in (
        (tokens[:0], "there is no token to run"),
        (np.array([256 * 256]), "there is no token 65536"),
        (np.zeros(CONTEXT + 1, np.int64), "do not fit the artifact's context of 64"),
    ):
        with pytest.raises(DeviceError, match=words):
            session.extend(given)
    with pytest.raises(DeviceError, match="there is no precision fp8; there is fp32 and fp16"):
        opened(folder, precision="fp8")
    with pytest.raises(DeviceError, match="there are no compute units gpu"):
        opened(folder, compute_units="gpu")
    with pytest.raises(DeviceError, match="give only one of them"):
        opened(folder, compute_units="all", precision="fp16")


@pytest.mark.skipif(sys.platform == "darwin", reason="there, Apple's runtime takes them")
def test_compute_units_need_a_mac(opened, export):
    with pytest.raises(DeviceError) as caught:
        opened(export("chunk16", chunk="16"), compute_units="cpu")
    assert str(caught.value) == (
        "compute units are chosen in Apple's runtime, which needs macOS 15 and coremltools (pip "
        'install "edgeforge[coreml]"); elsewhere leave --compute-units out'
    )


class FakeState:
    """Stands in for coremltools' MLState: what is written can be read."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}

    def read_state(self, name: str) -> object:
        return self.values[name]

    def write_state(self, name: str, value: object) -> None:
        self.values[name] = value


def test_apples_states_follow_a_text_from_function_to_function():
    states = _AppleStates(["k"])
    model = type("Model", (), {"make_state": lambda self: FakeState()})()
    states.of("prefill", model).write_state("k", 7)
    assert states.of("decode", model).read_state("k") == 7
    states.of("decode", model).write_state("k", 8)
    assert states.of("prefill", model).read_state("k") == 8


def test_on_a_mac_apples_runtime_is_taken(opened, export, monkeypatch):
    made = []
    monkeypatch.setattr(coreml_session.sys, "platform", "darwin")
    monkeypatch.setattr(AppleRunner, "__init__", lambda self, package, units: made.append(units))
    monkeypatch.setattr(AppleRunner, "runtime", "Core ML", raising=False)
    monkeypatch.setattr(AppleRunner, "make_states", lambda self, function: None)
    folder = export("chunk16", chunk="16")
    assert opened(folder).runtime == "Core ML"
    assert opened(folder, compute_units="cpu-and-ne").limits == ()
    assert made == ["all", "cpu-and-ne"]
    assert "interpreter" in opened(folder, precision="fp32").runtime
