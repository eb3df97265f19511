"""Caches of int8 give what NumPy gives that rounds keys and values by the scales in the file."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai as og
import pytest
import torch
from onnx import numpy_helper

from device_harness.errors import DeviceError
from device_harness.onnx_session import OnnxSession
from edgeforge.calibration.text import CalibrationOptions
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import CALIBRATION_TEXT, DEMO, HELDOUT, open_model
from edgeforge.pipeline import export
from edgeforge.reference.walk import Walk, block_pool, store_reader
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target
from exporters.target import ModelFacts
from quant.plans.recipes import find_recipe
from quant.program import dialect
from tests.oracles.genai import genai_greedy, session_greedy
from tests.oracles.tiny_families import CONFIGS

INT8 = TargetOptions(kv_cache="int8")
SHAPES = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
ROLES = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"}


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Letters, as in the calibration text: tokens that it lacks may reach beyond it."""
    return np.frombuffer(HELDOUT.read_bytes()[1000:1049], np.uint8).astype(np.int64)


def scales_in(graph) -> dict[str, np.ndarray]:
    """The scales of every layer's caches, ``float32[1, kv_heads, 1, head_dim]``, from the file."""
    model = onnx.load(graph)
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name.endswith(("k_scale", "v_scale"))
    }


def rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``[heads, t, width]``: to the nearest code, ties to even, clipped to 8 bits; then back."""
    return np.clip(np.rint(x / scale[0]), -128, 127) * scale[0]


def attention(q, k, v, window: int, scale: float, softcap: float) -> np.ndarray:
    """Causal attention of ``[heads, t, width]``, by its definition."""
    group = len(q) // len(k)
    k, v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    ahead = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    seen = (ahead >= 0) & (ahead < (window or q.shape[1]))
    scores = q @ k.transpose(0, 2, 1) * scale
    scores = np.tanh(scores / softcap) * softcap if softcap else scores
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


class RoundedCaches(Walk):
    """The program, but attention is NumPy's, on rounded keys and values."""

    def __init__(self, program, read, scales):
        super().__init__(program, read)
        self.scales = scales

    def prepare(self, node):
        if node.target is not dialect.ATTENTION:
            return super().prepare(node)
        cache = self.program.inputs[node.args[3].name].name
        layer = cache.removeprefix("model.layers.").partition(".")[0]
        by = [self.scales[f"layers.{layer}.{kind}_scale"] for kind in "kv"]

        def run(values):
            q, k, v = (values[source][0].numpy().transpose(1, 0, 2) for source in node.args[:3])
            k, v = rounded(k, by[0]), rounded(v, by[1])
            mixed = attention(q.astype(np.float64), k, v, *node.args[6:9])
            flat = mixed.transpose(1, 0, 2).reshape(1, q.shape[1], -1)
            return torch.from_numpy(flat.astype(np.float32))

        return run


def rounded_logits(made, folder, tokens) -> np.ndarray:
    read = store_reader(made.store)
    walk = RoundedCaches(made.program, read, scales_in(folder / "model.onnx"))
    values = walk.begin(torch.from_numpy(tokens))
    with block_pool() as pool:
        for node in walk.order:
            walk.advance(node, [values], pool)
    return values[made.program.output()][0].numpy()


PLAIN = ("packed", "window", "rotated outside", "apart", "half rotary")
# Softcaps, windows and rotations by layer, layers without caches, and queries' own rotations.
FAMILIES = ("gemma2", "gemma3_text", "lfm2", "ministral3", "smollm3")


@pytest.fixture(scope="module")
def make(build, llama_config, openelm_config, phi3_config):
    configs = {
        "packed": llama_config(),
        "window": llama_config(model_type="mistral", sliding_window=7),
        "rotated outside": llama_config(head_dim=24, num_attention_heads=3, num_key_value_heads=1),
        "apart": openelm_config([3, 4, 6], [1, 2, 3]),
        "half rotary": phi3_config(head_dim=32, partial_rotary_factor=0.5),
        **CONFIGS,
    }
    return lambda name: build(configs[name], asked=INT8)


@pytest.fixture(scope="module", params=PLAIN)
def made(request, make):
    return make(request.param)


def assert_equals(found: np.ndarray, wanted: np.ndarray, rounding: float) -> None:
    """The same but for numbers that fall on the other side of a half, which few do."""
    error = np.abs(found - wanted)
    assert found.shape == wanted.shape
    assert np.sqrt(np.mean(np.square(error))) < 0.05 * rounding
    assert error.max() < rounding


@pytest.mark.parametrize("name", (*PLAIN, *FAMILIES))
def test_a_text_in_pieces_to_the_last_position(make, tokens, name):
    made = make(name)
    wanted = rounded_logits(made, made.folder, tokens[:48])
    rounding = np.sqrt(np.mean(np.square(wanted - made.float_logits(tokens[:48]))))
    assert 1e-5 * np.ptp(wanted) < rounding < 1e-2 * np.ptp(wanted)
    session = OnnxSession(made.folder, made.manifest.context, 1)
    assert_equals(session.logits(tokens[:48]), wanted, rounding)
    at = 0
    for size in (21, 9, 1, 1, 15, 1):
        at += size
        assert_equals(session.extend(tokens[at - size : at]), wanted[at - 1], rounding)
        if size == 9:
            session.logits(tokens[::-1][:11].copy())
    assert at == 48
    with pytest.raises(DeviceError, match="49 tokens do not fit the artifact's context of 48"):
        session.extend(tokens[48:])
    session.reset()
    assert_equals(session.extend(tokens[:5]), wanted[4], rounding)


def test_what_lies_beyond_the_scales_is_clipped(made, tokens, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(made.folder, small)
    for name in ("model.onnx", "verify.onnx"):
        model = onnx.load(small / name, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name.endswith(("k_scale", "v_scale")):
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(small))
                values = numpy_helper.to_array(tensor) / 3
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        (small / name).write_bytes(model.SerializeToString())
    wanted = rounded_logits(made, small, tokens[:48])
    rounding = np.sqrt(np.mean(np.square(wanted - made.float_logits(tokens[:48]))))
    session = OnnxSession(small, made.manifest.context, 1)
    # A third of the range clips much: the error is no longer that of rounding.
    unclipped = rounded_logits(made, made.folder, tokens[:48])
    assert rounding > 3 * np.sqrt(np.mean(np.square(unclipped - made.float_logits(tokens[:48]))))
    assert_equals(session.logits(tokens[:48]), wanted, rounding)


def test_a_batch_gives_what_its_rows_give_alone(build, llama_config, tokens):
    made = build(llama_config(), asked=INT8)
    session = onnxruntime.InferenceSession(str(made.folder / "verify.onnx"))
    rows = np.stack([tokens[:20], tokens[20:40]])

    def run(rows):
        past = {
            value.name: np.zeros((len(rows), value.shape[1], 0, value.shape[3]), np.int8)
            for value in session.get_inputs()
            if value.type == "tensor(int8)"
        }
        mask = np.ones(rows.shape, np.int64)
        return session.run(None, {"input_ids": rows, "attention_mask": mask, **past})

    together, alone = run(rows), [run(rows[i : i + 1]) for i in range(2)]
    assert len(together) == 5 and together[1].dtype == np.int8
    for index in range(5):
        single = np.concatenate([values[index] for values in alone])
        assert np.abs(together[index].astype(np.float64) - single).max() <= (
            1 if index else 1e-2 * np.ptp(single)
        )


def test_rows_of_unequal_length_give_what_they_give_alone(build, llama_config, tokens):
    made = build(llama_config(), asked=INT8)
    session = onnxruntime.InferenceSession(str(made.folder / "model.onnx"))
    wide = [v for v in session.get_inputs() if v.type == "tensor(int8)"]

    def run(ids, lengths, past):
        total = past[0].shape[2] + ids.shape[1]
        mask = (np.arange(total) < np.array(lengths)[:, None]).astype(np.int64)
        caches = {v.name: cache for v, cache in zip(wide, past, strict=True)}
        return session.run(None, {"input_ids": ids, "attention_mask": mask, **caches})

    def empty(rows):
        return [np.zeros((rows, v.shape[1], 0, v.shape[3]), np.int8) for v in wide]

    short = tokens[20:28]
    batch = np.stack([tokens[:20], np.r_[short, np.zeros(12, np.int64)]])
    together, alone = run(batch, [20, 8], empty(2)), run(short[None], [8], empty(1))
    scale = np.ptp(alone[0])
    assert np.abs(together[0][1] - alone[0][0]).max() < 1e-2 * scale
    step = np.array([[3], [5]])
    decoded = run(step, [21, 9], together[1:])[0]
    wanted = run(step[1:], [9], alone[1:])[0]
    assert np.abs(decoded[1] - wanted[0]).max() < 1e-2 * scale


def test_the_manifest_says_it(build, llama_config):
    made = build(llama_config(), asked=INT8)
    manifest = made.manifest
    assert manifest.options == {"kv_cache": "int8"}
    assert manifest.states["past_key_values.0.key"] == "int8[batch_size, 2, past_length, 16]"
    assert any("static scales, one for each key/value head" in note for note in manifest.notes)
    assert manifest.calibration.source == "demo"
    assert 8192 - 48 < manifest.calibration.tokens <= 8192
    rows = manifest.structure["Caches"]
    assert {row["graph"]: (row["type"], row["caches"]) for row in rows} == {
        "model.onnx": ("int8", 4),
        "verify.onnx": ("int8", 4),
    }
    assert {row["scales"] for row in rows} == {"static, one for each head and column"}
    plain = build(llama_config(), asked=TargetOptions(kv_cache="fp32")).manifest
    assert plain.states["past_key_values.0.key"] == "float[batch_size, 2, past_length, 16]"
    assert not plain.calibration and not any("static" in note for note in plain.notes)
    assert {row["type"] for row in plain.structure["Caches"]} == {"float"}


def test_more_context_fits_the_same_memory():
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    facts = ModelFacts("llama", 64, 64, (4, 4), (2, 2), 256, (257,), None, 100_000)
    largest = {}
    for dtype in ("fp32", "int8"):
        options = TargetOptions(kv_cache=dtype, max_memory=100_000_000)
        with pytest.raises(ExportError) as caught:
            find_target("onnx").check(plan, SHAPES, facts, options)
        largest[dtype] = int(str(caught.value).split("--context ")[1].split()[0])
    others = 64 * 4 + 4 * 128 * 4  # a rotary table's row, and the scores of a run
    wanted = (2 * 4 * 64 * 4 + others) / (2 * 4 * 64 + others)
    assert largest["int8"] / largest["fp32"] == pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize(
    ("target", "kv_cache", "words"),
    [
        ("onnx", "int4", "--kv-cache int4 is not known to onnx: take fp32 or int8"),
        (
            "coreml",
            "int8",
            "coreml, whose caches are float16, because Core ML's states hold nothing else, has no "
            "option --kv-cache: leave it out",
        ),
    ],
)
def test_what_is_refused(checkpoint_of, cache, llama_config, tmp_path, target, kv_cache, words):
    asked = ExportOptions("int4-g32", target=TargetOptions(kv_cache=kv_cache))
    with pytest.raises(ExportError) as caught:
        export(checkpoint_of(llama_config()), [find_target(target)], tmp_path / "out", asked)
    assert str(caught.value) == words
    assert not (tmp_path / "out").exists()


def test_beside_core_ml_it_applies_to_onnx_and_both_say_so(
    checkpoint_of, cache, llama_config, tmp_path
):
    asked = ExportOptions(
        "int4-g32", context=48, target=INT8, calibration=CalibrationOptions(tokens=480, length=48)
    )
    targets = [find_target("onnx"), find_target("coreml")]
    export(checkpoint_of(llama_config()), targets, tmp_path / "out", asked)
    sentence = (
        "--kv-cache int8 does not apply to coreml, whose caches are float16, because Core ML's "
        "states hold nothing else"
    )
    onnx, coreml = (Manifest.read(tmp_path / "out" / each.name).warnings for each in targets)
    assert sentence in coreml and sentence not in onnx
    assert Manifest.read(tmp_path / "out" / "onnx").options == {"kv_cache": "int8"}


def test_the_held_out_text_cannot_calibrate_caches(checkpoint_of, cache, llama_config, tmp_path):
    options = ExportOptions(
        "int4-g32", context=48, target=INT8, calibration=CalibrationOptions(str(HELDOUT))
    )
    with pytest.raises(UsageError, match="shares a passage with the held-out text"):
        export(checkpoint_of(llama_config()), [find_target("onnx")], tmp_path / "out", options)


def test_genai_and_a_stripped_artifact_give_the_same_tokens(
    checkpoint_of, cache, llama_config, tmp_path, tokens
):
    model = checkpoint_of(llama_config())
    text = CalibrationOptions(tokens=480, length=48)
    for name, strip in (("whole", False), ("stripped", True)):
        asked = TargetOptions(kv_cache="int8", strip=strip)
        options = ExportOptions("int4-g32", context=48, target=asked, calibration=text)
        export(model, [find_target("onnx")], tmp_path / name, options)
    app = OnnxSession(tmp_path / "whole", 48, 1)
    rows = [app.extend(tokens[at : at + 1]) for at in range(30)]
    found = OnnxSession(tmp_path / "stripped", 48, 1).logits(tokens[:30])
    assert found.tobytes() == np.stack(rows).tobytes()

    app.reset()
    prompt, wanted = [256, 72, 105, 32, 116], []
    row = app.extend(np.array(prompt))
    while len(wanted) < 40 and (token := int(row.argmax())) != 257:
        wanted.append(token)
        row = app.extend(np.array([token]))
    generating = og.Model(str(tmp_path / "whole"))
    search = og.GeneratorParams(generating)
    search.set_search_options(max_length=len(prompt) + len(wanted), do_sample=False)
    generator = og.Generator(generating, search)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert [int(t) for t in generator.get_sequence(0)[len(prompt) :]] == wanted
    assert len(wanted) >= 20


def test_what_rounding_costs_the_demo_model(cache, tmp_path):
    out = tmp_path / "demo"
    text = CalibrationOptions(tokens=2048)
    options = ExportOptions("int4", context=512, target=INT8, calibration=text)
    export(open_model(DEMO), [find_target("onnx")], out, options)
    stores = set((cache / "stores").iterdir())
    found = verify(out, VerifyOptions(tokens=1024, threads=1, timed=False))
    assert found.lowering.kl_mean < 1e-3
    assert found.lowering.top1_agreement > 0.98  # of 1024 tokens: one is a thousandth
    assert found.stored_weights_equal
    # The text is of the caches alone: the weights' store is the recipe's own.
    assert set((cache / "stores").iterdir()) == stores
    with pytest.raises(UsageError, match="shares a passage with the text that the artifact was"):
        verify(out, VerifyOptions(text=CALIBRATION_TEXT, timed=False))


def test_onnxruntime_genai_keeps_int8_caches_beside_recent_tokens(make, tokens):
    folder, prompt = make("lfm2").folder, [256, *map(int, tokens[:17])]
    wanted = session_greedy(folder, prompt, 20)
    assert genai_greedy(folder, prompt[:7], prompt[7:], count=20) == wanted
    assert len(wanted) > 8
