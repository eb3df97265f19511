"""Recurrent layers in packages: what they compute, what their states hold, what is read back."""

from __future__ import annotations

import numpy as np
import pytest

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.values import Precision
from exporters.coreml import names
from exporters.coreml.lifted import read_package
from exporters.coreml.memory import FINER, UNIT
from exporters.coreml.package import open_package
from exporters.coreml.reader import stored_digests
from exporters.lifted import (
    ShortConv,
    StoredWeight,
    Unknown,
)
from exporters.lifted_recurrent import (
    Function,
    Gain,
    Previous,
    Recurrence,
    UnitNorm,
)
from tests.exporters.coreml.vocabulary_model import CONTEXT, made, values_of
from tests.oracles.recurrent_layers import CONV, MAMBA, unit_epsilon
from tests.oracles.vocabulary import RECURRENT, VOCAB, small_spec

TEXT = np.random.default_rng(5).integers(0, VOCAB, 40)
# Each layer in several ways: functions of a fixed and of a chosen number of tokens, both profiles,
# states and inputs in place of states.
WAYS = {
    "rwkv5-choice": ("rwkv5", {"chunk": "4,16"}, "int8-pc", 5e-6),
    "rwkv6": ("rwkv6", {}, "fp32", 5e-6),
    "mamba-inputs": ("mamba-mixture", {"opset": "ios17"}, "fp16", 5e-6),
    "mamba-engine": ("mamba", {"profile": "ane"}, "fp16", 4e-4),
    "delta-net": ("delta-net", {"chunk": "16,48"}, "fp32", 5e-6),
}

# A package for iOS 17 has inputs in place of states.
WITH_STATES = [name for name, (_, options, *_) in WAYS.items() if options.get("opset") != "ios17"]


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / np.ptp(wanted)


@pytest.fixture(scope="module", params=WAYS)
def way(request, tmp_path_factory):
    """A model of small weights, its spec, and the bound on its error in float32."""
    name, options, format, bound = WAYS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return made(folder, RECURRENT[name], format=format, size=0.5, **options), name, bound


def test_logits(way, run_package):
    package, _, bound = way
    wanted = package.reference().logits(TEXT)
    for precision, most in (("fp32", bound), ("fp16", 5e-3)):
        session = run_package(package.folder, precision)
        assert largest_error(session.logits(TEXT), wanted) < most
        session.extend(TEXT[::-1])
        session.reset()  # the second text finds nothing of the first
        ends = (16, 17, 18, 22, 38)
        starts = (0, *ends[:-1])
        found = np.stack([session.extend(TEXT[a:b]) for a, b in zip(starts, ends, strict=True)])
        assert largest_error(found, wanted[[end - 1 for end in ends]]) < most


def test_what_is_read_back(way):
    package, name, _ = way
    layers = RECURRENT[name].layers
    wanted = {i: layer.recurrence for i, layer in enumerate(layers) if layer.recurrence}
    reading = read_package(open_package(package.folder / names.PACKAGE), CONTEXT, cache_multiple=1)
    for entry in reading.entry_points:
        values = values_of(entry.logits)
        assert entry.outside == ()
        assert [value for value in values if isinstance(value, Unknown)] == []
        begins = tuple(probe.start == 0 for probe in entry.probes)
        found = {value.memory.read: value for value in values if isinstance(value, Recurrence)}
        assert set(found) == {f"{index}.memory" for index in wanted}
        for index, spec in wanted.items():
            each, at = found[f"{index}.memory"], f"model.layers.{index}.time_mix"
            assert each.memory.written == each.memory.read
            assert each.memory.ignored == begins
            assert each.dimensions == (
                spec.heads, spec.key_heads, spec.key_width, spec.value_width
            )  # fmt: skip
            assert (each.beta is not None) == (name == "delta-net")
            assert (each.bonus is not None) == name.startswith("rwkv")
            if each.bonus is not None:
                assert each.bonus.name == f"{at}.bonus.weight"
                held = package.store.part(each.bonus.name, "value").numpy()
                np.testing.assert_array_equal(each.bonuses, held)
            assert isinstance(each.decay, StoredWeight) == (name == "rwkv5")
            if isinstance(each.decay, StoredWeight):
                assert each.decay.name == f"{at}.decay.weight"
                held = package.store.part(each.decay.name, "value").numpy()
                np.testing.assert_array_equal(each.decays, held)
        recent = [v.recent for v in values if isinstance(v, Previous | ShortConv)]
        parts = ("recent", "mlp_recent") if name.startswith("rwkv") else ("recent",)
        states = sorted(f"{index}.{part}" for index in wanted for part in parts)
        assert sorted(each.read for each in recent) == states
        assert all(each.read == each.written and each.ignored == begins for each in recent)
        for value in values:
            if isinstance(value, Gain):
                held = package.store.part(value.weight.name, "value").numpy()
                np.testing.assert_array_equal(value.values.ravel(), held.ravel())
            if isinstance(value, UnitNorm):
                np.testing.assert_allclose(value.epsilon, unit_epsilon(RECURRENT[name]), rtol=1e-6)
        functions = {value.function for value in values if isinstance(value, Function)}
        assert functions == {
            "rwkv5": {"relu"},
            "rwkv6": {"tanh", "exp", "relu"},
        }.get(name, {"softplus"})


def test_every_weight_is_stored_exactly(way):
    package, _, _ = way
    assert stored_digests(package.folder / names.PACKAGE) == package.store.digests


def test_states_have_names_and_shapes(way):
    package, name, _ = way
    opened = open_package(package.folder / names.PACKAGE)
    interface = opened.interface(opened.default_function)
    given = {each.name: each.shape for each in (*interface.states, *interface.inputs)}
    made = RECURRENT[name].layers[0].recurrence
    rows, columns = made.key_width, made.value_width
    if opened.metadata["edgeforge.profile"] == "ane":
        rows = columns = 32
    assert given["memoryHigh_0"] == given["memoryLow_0"] == (1, made.heads, rows, columns)
    if name.startswith("rwkv"):
        assert {"shiftState_0", "channelShiftState_0"} <= set(given)
    else:
        assert "convState_0" in given


def decoded(interpreter, tokens, states=None, start=0):
    """The logits after some tokens, one call each, and the states or what stands for them."""
    function = interpreter.package.default_function
    states = interpreter.make_states(function) if states is None else states
    logits = None
    for position, token in enumerate(tokens, start):
        given = np.array([[token]], np.int32), np.array([position], np.int32)
        inputs = dict(zip((names.TOKENS, names.POSITION), given, strict=True))
        logits = interpreter.run(inputs, function, states)[names.LOGITS]
    return logits, states


@pytest.mark.parametrize("way", WITH_STATES, indirect=True)
def test_a_text_at_position_0_reads_nothing_of_a_broken_one(way):
    package, _, _ = way
    interpreter = Interpreter(open_package(package.folder / names.PACKAGE), Precision.FP16)
    broken = [name for name in interpreter.states() if not name.startswith(("key", "value"))]
    wanted, _ = decoded(interpreter, TEXT[:1])
    for name in broken:
        states = interpreter.make_states(interpreter.package.default_function)
        states[name].tensor.fill_(np.nan)
        found, _ = decoded(interpreter, TEXT[:1], states)
        np.testing.assert_array_equal(found, wanted)
        # At another position it is read.
        states[name].tensor.fill_(np.nan)
        found, _ = decoded(interpreter, TEXT[:1], states, start=1)
        assert np.isnan(found).any(), name


def split(memory):
    """The two float16 states of a memory, as the package writes them."""
    whole = memory.astype(np.float32) / np.float32(UNIT)
    with np.errstate(over="ignore"):
        high = whole.astype(np.float16)
        low = ((whole - high.astype(np.float32)) * np.float32(FINER)).astype(np.float16)
    return high, low


def joined(high, low):
    whole = high.astype(np.float32) + low.astype(np.float32) / np.float32(FINER)
    return whole * np.float32(UNIT)


def test_two_states_hold_22_bits_of_what_a_memory_may_be():
    draw = np.random.default_rng(3)
    for size in np.logspace(-3, 5, 9):
        memory = (draw.normal(size=1000) * size).astype(np.float32)
        error = np.abs(joined(*split(memory)) - memory)
        assert (error <= np.abs(memory) * 2.0**-22 + 2.0**-32).all()
    largest = np.float32(65504 * UNIT)
    np.testing.assert_allclose(joined(*split(largest)), largest, rtol=2.0**-22)
    with np.errstate(invalid="ignore"):  # what is larger is no number, and is no wrong one
        assert not np.isfinite(joined(*split(np.float32(1.1) * largest)))


@pytest.mark.parametrize("decay", [-1e-3, -1e-5, 0.0])
def test_a_memory_in_one_float16_drifts_over_4000_tokens_and_in_two_does_not(decay):
    """Rounded at every token, as `decode` does; against float64.

    The keys and values have a mean, so that the sums grow and what is added becomes small beside
    them.
    """
    draw = np.random.default_rng(4)
    keys, values, queries = draw.normal(0.3, 1, (3, 4000, 16))
    exact, one, two = np.zeros((16, 16)), np.float32(0), split(np.zeros((16, 16)))
    kept = np.exp(np.float32(decay))
    for k, v in zip(keys, values, strict=True):
        new = np.outer(k, v)
        exact = float(kept) * exact + new
        new = new.astype(np.float32)
        one = (kept * one + new).astype(np.float16).astype(np.float32)
        two = split(kept * joined(*two) + new)
    wanted = queries[-100:] @ exact
    plain, halves = (largest_error(queries[-100:] @ each, wanted) for each in (one, joined(*two)))
    assert plain > 1e-3
    assert halves < 1e-5
    assert plain > 300 * halves


@pytest.mark.parametrize("way", WITH_STATES, indirect=True)
def test_the_interpreter_keeps_a_memory_in_two_states(way):
    package, name, _ = way
    opened, first = open_package(package.folder / names.PACKAGE), RECURRENT[name].layers[0]
    made = first.recurrence
    held = {}
    for precision in Precision:
        _, states = decoded(Interpreter(opened, precision), TEXT[:12])
        rows, columns = slice(made.key_width), slice(made.value_width)
        held[precision] = [
            states[f"memory{part}_0"].tensor.numpy()[:, :, rows, columns]
            for part in ("High", "Low")
        ]
    high, low = held[Precision.FP16]
    memory = joined(high, low)
    for found, wanted in zip((high, low), split(memory), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert np.abs(memory - high * UNIT).max() > 1e-5 * np.abs(memory).max()
    unrounded = held[Precision.FP32][0] * UNIT
    assert largest_error(memory, unrounded) < 3e-3  # activations are float16


def test_keys_that_repeat_do_not_spoil_the_delta_rule(way, run_package):
    """48 equal tokens in one call: powers of their links would grow beyond float32."""
    package, _, bound = way
    text = np.full(48, 7)
    wanted = package.reference().logits(text)
    assert largest_error(run_package(package.folder).logits(text), wanted) < bound


def test_coremltools_reopens_them_and_infers_the_same_types(way, reopen):
    package, _, _ = way
    _, program = reopen(package.folder)
    for function in program.functions.values():
        assert function.outputs[0].shape[2] == VOCAB


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("exporters.coreml.memory.FINER", 1024.0),
        ("exporters.coreml.memory.UNIT", 1.0),
        ("exporters.coreml.recurrence.FORGOTTEN", -1.0),
    ],
)
def test_what_computes_something_else_is_not_read_as_a_recurrence(
    place, value, monkeypatch, tmp_path
):
    asked = small_spec((MAMBA,), conv_width=CONV)
    monkeypatch.setattr(place, value)
    package = made(tmp_path, asked, format="fp32", chunk="4", strip=True)
    opened = open_package(package.folder / names.PACKAGE)
    _, prefill = read_package(opened, CONTEXT, cache_multiple=1).entry_points
    values = values_of(prefill.logits)
    assert not any(isinstance(each, Recurrence) for each in values)
    assert any(isinstance(each, Unknown) for each in values)
