"""Norms, rotary embedding and softmax survive activations that float16 cannot square."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.values import Precision
from exporters.coreml import names
from exporters.coreml.emitter import Emitter
from exporters.coreml.lowering import lower_function
from exporters.coreml.norms import (
    scaled_layer_norm,
    scaled_rms_norm,
    wide_layer_norm,
    wide_rms_norm,
)
from exporters.coreml.package import open_package
from exporters.coreml.package_writer import Metadata, WrittenFunction, model_message, write_manifest
from exporters.coreml.state import FunctionLowering, Style
from exporters.coreml.weight_file import WeightFile
from exporters.coreml.weights import WeightBank
from quant.program import ops, state_ops
from quant.program.program import Input, Program
from quant.store.store import Extent

NOTHING = Metadata("", "", "", "", {})


def interpret(emitter: Emitter, file: WeightFile, folder) -> Interpreter:
    """Writes one function as a package and opens it in float16."""
    values = (*emitter.inputs, *emitter.outputs, *emitter.states)
    function = WrittenFunction(emitter, (), {value.name: "." for value in values})
    package = folder / names.PACKAGE
    (package / names.WEIGHTS_PATH).parent.mkdir(parents=True)
    message = model_message([function], 9, NOTHING)
    (package / names.MODEL_PATH).write_bytes(message.SerializeToString())
    file.write(package / names.WEIGHTS_PATH)
    write_manifest(package)
    return Interpreter(open_package(package), Precision.FP16)


def hard_rows(width: int) -> np.ndarray:
    """Activations of every size: ``float16[9, width]``; the last row is zeros."""
    draw = np.random.default_rng(width)
    sizes = np.array([3e-6, 1e-4, 1e-3, 0.1, 1, 30, 1e3, 2e4])[:, None]
    x = (draw.normal(0, 1, (8, width)) * sizes).clip(-60000, 60000)
    x[6, 3] = 60000  # one activation that dwarfs the rest
    return np.concatenate([x, np.zeros((1, width))]).astype(np.float16)


def normalised(norm, x, vectors, epsilon, folder) -> np.ndarray:
    """What a norm makes of activations in float16; ``vectors`` are its weight and its bias."""
    emitter, file = Emitter("main", "CoreML8"), WeightFile()
    given, bank = emitter.input("x", "fp16", x.shape), WeightBank(None, file)
    stored = [bank.table(emitter, f"w{index}", each) for index, each in enumerate(vectors)]
    made = norm(emitter, "y", given, *stored, epsilon)
    emitter.output(emitter.cast("half", made, "fp16"))
    (found,) = interpret(emitter, file, folder).run({"x": x}, "main").values()
    return found.astype(np.float64)


@pytest.mark.parametrize("norm", [wide_rms_norm, scaled_rms_norm])
@pytest.mark.parametrize("width", [16, 2048])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_norms(norm, width, epsilon, tmp_path):
    x = hard_rows(width)
    weight = np.random.default_rng(width).normal(1, 0.1, width).astype(np.float16)
    found = normalised(norm, x, [weight], epsilon, tmp_path)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon) * weight
    assert np.isfinite(found).all()
    # A few roundings of float16, and its step near zero.
    assert (np.abs(found - wanted) <= 4e-3 * np.abs(wanted) + 2e-5).all()
    assert np.abs(found[-1]).max() == 0


@pytest.mark.parametrize("norm", [wide_layer_norm, scaled_layer_norm])
@pytest.mark.parametrize("width", [16, 2048])
@pytest.mark.parametrize("offset", [0.0, 5.0, 40000.0])
def test_layer_norms(norm, width, offset, tmp_path):
    draw = np.random.default_rng(width)
    x = (hard_rows(width).astype(np.float64) + offset).clip(-65504, 65504).astype(np.float16)
    weight, bias = (draw.normal(1, 0.1, width).astype(np.float16) for _ in range(2))
    found = normalised(norm, x, [weight, bias], 1e-5, tmp_path)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    plain = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    wanted = plain * weight + bias
    assert np.isfinite(found).all()
    assert (np.abs(found - wanted) <= 6e-3 * (np.abs(plain) + 1)).all()
    assert (np.abs(found[-1] - bias) <= 1e-3).all()


class Core(nn.Module):
    """Attention with its rotary embedding; a table gives q, k and v of each token."""

    def __init__(self, tokens, heads, kv_heads, width, context, softcap):
        super().__init__()
        self.softcap = softcap
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        columns = (heads + 2 * kv_heads) * width
        self.table = nn.Parameter(torch.empty(tokens, columns), requires_grad=False)
        cache = torch.zeros(1, kv_heads, context, width)
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", cache.clone())
        self.register_buffer("cos", torch.empty(context, width // 2))
        self.register_buffer("sin", torch.empty(context, width // 2))

    def forward(self, tokens, position):
        heads, t = (self.heads, self.kv_heads, self.kv_heads), tokens.shape[1]
        packed = ops.embedding(tokens, self.table)
        q, k, v = (
            part.view(1, t, count, self.width)
            for part, count in zip(
                packed.split([n * self.width for n in heads], -1), heads, strict=True
            )
        )
        q = ops.rope(q, self.cos, self.sin, position)
        k = ops.rope(k, self.cos, self.sin, position)
        caches = self.k_cache, self.v_cache
        scale = self.width**-0.5
        return state_ops.attention(q, k, v, *caches, position, 0, scale, self.softcap)


class OneTable:
    """A store of a single float16 weight."""

    def __init__(self, folder, values):
        (folder / "store").write_bytes(values.tobytes())
        self.extent = Extent(folder / "store", 0, values.nbytes, "F16", values.shape)

    def extents(self, weight):
        return {"value": self.extent}


HEADS, KV_HEADS, WIDTH, CONTEXT = 4, 2, 32, 32


def core_program(cos, sin, softcap=0.0) -> Program:
    module = Core(CONTEXT, HEADS, KV_HEADS, WIDTH, CONTEXT, softcap)
    example = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    shapes = {"tokens": {1: torch.export.Dim("t", min=1, max=CONTEXT)}, "position": None}
    exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
    kinds = {"k_cache": "cache", "v_cache": "cache", "cos": "table", "sin": "table"}
    inputs = {}
    for item in exported.graph_signature.input_specs:
        target = item.target or item.arg.name
        name = f"model.layers.0.self_attn.{target}" if "cache" in target else f"rope_{target}"
        kind = kinds.get(target, "weight" if target == "table" else target)
        inputs[item.arg.name] = Input(kind, name if target != "table" else "table.weight")
    tables = {"rope_cos": cos, "rope_sin": sin}
    return Program(exported.graph, inputs, tables, CONTEXT, HEADS * WIDTH)


def reference(table, cos, sin, softcap=0.0):
    """Rotary embedding and causal attention of tokens 0, 1, ... in float64."""
    rows = table.astype(np.float64).reshape(CONTEXT, -1, WIDTH)
    q, k, v = np.split(rows, [HEADS, HEADS + KV_HEADS], 1)
    c, s = cos.numpy()[:, None].astype(np.float64), sin.numpy()[:, None].astype(np.float64)

    def rotate(x):
        first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    q, k = rotate(q), np.repeat(rotate(k), HEADS // KV_HEADS, 1)
    v = np.repeat(v, HEADS // KV_HEADS, 1)
    scores = np.einsum("qhd,khd->hqk", q, k) * WIDTH**-0.5
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    scores += np.where(np.tri(CONTEXT, dtype=bool), 0, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(CONTEXT, -1)


@pytest.fixture(scope="module")
def rotary():
    angles = torch.arange(CONTEXT)[:, None] * 100.0 ** -torch.linspace(0, 1, WIDTH // 2)
    return angles.cos(), angles.sin()


STYLES = [
    Style("gpu", "ios18", False, CONTEXT),
    Style("ane", "ios18", True, CONTEXT),
    Style("ane", "ios18", False, CONTEXT),
]


def attention(style, size, rotary, softcap, folder) -> tuple[np.ndarray, np.ndarray]:
    """Attention of values, keys and queries of a size in float16, and in float64.

    At 1e3, scores are a hundred times float16's range.
    """
    draw = np.random.default_rng(3)
    shape = CONTEXT, (HEADS + 2 * KV_HEADS) * WIDTH
    table = (draw.uniform(-1, 1, shape) * size).astype(np.float16)
    file = WeightFile()
    bank = WeightBank(OneTable(folder, table), file)
    program = core_program(*rotary, softcap)
    emitter = lower_function(FunctionLowering(program, bank, "main", CONTEXT, style))
    interpreter = interpret(emitter, file, folder)
    ids = {names.TOKENS: np.arange(CONTEXT)[None], names.POSITION: np.zeros(1)}
    inputs = {name: value.astype(np.int32) for name, value in ids.items()}
    states = interpreter.make_states("main")
    found = interpreter.run(inputs, "main", states)[names.LOGITS][0].astype(np.float64)
    assert np.isfinite(found).all()
    return found, reference(table, *rotary, softcap)


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3, 2e4])
def test_attention_and_rotary_embedding(style, size, rotary, tmp_path):
    found, wanted = attention(style, size, rotary, 0.0, tmp_path)
    error = np.abs(found - wanted).max(1) / size
    # Where scores are large one token takes all, and rounding decides between near ties.
    assert np.median(error) < 2e-3
    assert (error < 2e-2).mean() > (0.99 if size <= 1 else 0.85)


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 5.0, 10.0, 1e3, 2e4])
def test_attention_with_a_softcap(style, size, rotary, tmp_path):
    found, wanted = attention(style, size, rotary, 50.0, tmp_path)
    error = np.abs(found - wanted).max(1) / size
    assert np.median(error) < 3e-3
    assert (error < 2e-2).mean() > (0.99 if size <= 1 else 0.95)
