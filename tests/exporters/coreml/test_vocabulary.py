"""Operators that no family needs alone: each way to write them, and what packages hold of them."""

from __future__ import annotations

import numpy as np
import pytest

from edgeforge.families.spec import LayerSpec
from exporters.coreml import names
from exporters.coreml.lifted import read_package
from exporters.coreml.package import open_package
from exporters.coreml.reader import stored_digests
from exporters.lifted import (
    Attention,
    Bias,
    Clamp,
    Gelu,
    LayerNorm,
    Norm,
    Scaled,
    ShortConv,
    Softcap,
    Unknown,
)
from tests.exporters.coreml.vocabulary_model import (
    CONTEXT,
    FFN,
    VOCAB,
    WIDTH,
    made,
    spec,
    values_of,
)

TEXT = np.random.default_rng(5).integers(0, VOCAB, 40)
WAYS = {
    "sandwich": ({"block": "sandwich"}, {}, "fp32", 5e-6),
    "pre": ({"block": "pre", "norm": "rms"}, {"cache_write": "onehot"}, "int8-pc", 5e-6),
    "post": ({"block": "post", "activation": "gelu"}, {"opset": "ios17"}, "fp32", 5e-6),
    "parallel": ({"block": "parallel", "gated": False}, {"chunk": "4,16"}, "fp16", 5e-6),
    "engine": ({"block": "sandwich"}, {"profile": "ane"}, "fp16", 4e-4),
    "engine-choice": (
        {"block": "pre", "biases": False},
        {"profile": "ane", "chunk": "4,16"},
        "fp16",
        4e-4,
    ),
}


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / np.ptp(wanted)


@pytest.fixture(scope="module", params=WAYS)
def way(request, tmp_path_factory):
    """A model exported in one way, and the bound on its error in float32."""
    changes, options, format, bound = WAYS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return made(folder, spec(**changes), format=format, **options), bound


def test_logits(way, run_package):
    package, bound = way
    wanted = package.reference().logits(TEXT)
    for precision, most in (("fp32", bound), ("fp16", 5e-3)):
        session = run_package(package.folder, precision)
        assert largest_error(session.logits(TEXT), wanted) < most
        for _ in range(2):  # the second text finds nothing of the first
            ends = (16, 17, 18, 22, 38)
            starts = (0, *ends[:-1])
            found = np.stack([session.extend(TEXT[a:b]) for a, b in zip(starts, ends, strict=True)])
            assert largest_error(found, wanted[[end - 1 for end in ends]]) < most
            session.reset()


def test_what_is_read_back(way):
    package, _ = way
    opened = open_package(package.folder / names.PACKAGE)
    reading = read_package(opened, CONTEXT, cache_multiple=1)
    for entry in reading.entry_points:
        values = values_of(entry.logits)
        assert entry.outside == ()
        assert [value for value in values if isinstance(value, Unknown)] == []
        (conv,) = (value for value in values if isinstance(value, ShortConv))
        assert (conv.recent.read, conv.recent.written) == ("3.recent", "3.recent")
        assert conv.recent.ignored == tuple(probe.start == 0 for probe in entry.probes)
        weight = package.store.part(conv.weight.name, "value").numpy()
        np.testing.assert_array_equal(conv.values, weight)
        attentions = [value for value in values if isinstance(value, Attention)]
        heads = {"0.key": (4, 2, WIDTH), "1.key": (4, 2, WIDTH), "2.key": (3, 1, WIDTH)}
        assert {each.keys.read: each.heads for each in attentions} == heads
        for each in attentions:
            np.testing.assert_allclose((each.scale, each.softcap), (0.3, 5.0), rtol=1e-3)
        for value in values:
            if isinstance(value, Bias):
                stored = package.store.part(value.weight.name, "value").numpy().ravel()
                np.testing.assert_array_equal(value.values, stored)
        kinds = {type(value) for value in values}
        assert {Softcap, Scaled, Clamp, Gelu, Bias, Norm} <= kinds
        tanh = {value.tanh for value in values if isinstance(value, Gelu)}
        assert len(tanh) == 1
        for value in values:
            if isinstance(value, LayerNorm | Norm):
                np.testing.assert_allclose(value.epsilon, 1e-5, rtol=1e-3)


def test_states_have_the_shapes_that_their_processor_takes(way):
    package, _ = way
    opened = open_package(package.folder / names.PACKAGE)
    interface = opened.interface(opened.default_function)
    given = {each.name: each.shape for each in (*interface.states, *interface.inputs)}
    engine = "64" in str(given["keyCache_0"])  # 48 tokens, padded
    assert given["keyCache_0"] == ((1, 2, 64, 32) if engine else (1, 2, CONTEXT, WIDTH))
    assert given["convState_3"] == ((1, 32, 32) if engine else (1, 2, 32))
    assert set(given) - {names.TOKENS, names.POSITION} == {
        *(f"{kind}Cache_{layer}" for kind in ("key", "value") for layer in range(3)),
        "convState_3",
    }


def test_every_weight_is_stored_exactly(way):
    package, _ = way
    assert stored_digests(package.folder / names.PACKAGE) == package.store.digests


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    """A model of one convolution and one attention that are all of it."""
    layers = (LayerSpec(0, 0, FFN, mixer="short_conv"), LayerSpec(4, 2, FFN, rope=None))
    plain = {"block": "pre", "logit_softcap": 0.0, "attention_softcap": 0.0}
    return made(tmp_path_factory.mktemp("convolution"), spec(layers, **plain), format="fp16")


def test_a_text_at_position_0_reads_nothing_of_a_broken_one(convolution):
    from device_harness.coreml_interpreter.interpreter import Interpreter
    from device_harness.coreml_interpreter.values import Precision

    interpreter = Interpreter(open_package(convolution.folder / names.PACKAGE), Precision.FP16)
    fresh, broken = (interpreter.make_states(names.DECODE) for _ in range(2))
    broken["convState_0"].tensor.fill_(np.nan)
    inputs = {names.TOKENS: np.array([[7]], np.int32), names.POSITION: np.zeros(1, np.int32)}
    found = [
        interpreter.run(inputs, names.DECODE, states)[names.LOGITS] for states in (fresh, broken)
    ]
    np.testing.assert_array_equal(*found)
    # At another position it is read.
    inputs[names.POSITION] = np.ones(1, np.int32)
    broken["convState_0"].tensor.fill_(np.nan)
    assert np.isnan(interpreter.run(inputs, names.DECODE, broken)[names.LOGITS]).any()


def test_a_bias_is_added_within_its_product_where_that_is_exact(tmp_path, operations):
    asked = spec((LayerSpec(4, 2, FFN),), block="pre")
    exact = made(tmp_path / "exact", asked, format="fp16")
    kinds = [(each.type, each.outputs[0].name) for each in operations(exact.folder, names.DECODE)
             if each.outputs]  # fmt: skip
    added = [name for kind, name in kinds if kind == "add" and name.startswith("op_bias")]
    assert added == []
    # Values that float16 would round stay float32 and are added apart.
    tiny = made(tmp_path / "tiny", asked, format="fp16", size=1e-6)
    kinds = [(each.type, each.outputs[0].name) for each in operations(tiny.folder, names.DECODE)
             if each.outputs]  # fmt: skip
    added = [name for kind, name in kinds if kind == "add" and name.startswith("op_bias")]
    assert len(added) == 6
    assert stored_digests(tiny.folder / names.PACKAGE) == tiny.store.digests


def test_a_stream_beyond_float16_stays_finite_for_the_gpu(tmp_path, run_package):
    asked = spec(
        (LayerSpec(4, 2, FFN, rope=0), LayerSpec(4, 2, FFN)),
        norm="rms",
        biases=False,
        embedding_multiplier=200000.0,
        residual_multiplier=1.0,
    )
    package = made(tmp_path, asked, format="fp16")
    wanted = package.reference().logits(TEXT)
    found = run_package(package.folder, "fp16").logits(TEXT)
    assert largest_error(found, wanted) < 5e-3
