"""Caches of int8 give what torch's own rounding of queries, keys and values gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers the operators)

from device_harness.errors import DeviceError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import DEMO, open_model
from edgeforge.pipeline import export
from edgeforge.reference.walk import Walk, block_pool, store_reader
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.errors import ExportError
from exporters.executorch.reader import read_pte
from exporters.options import TargetOptions
from exporters.registry import find_target
from exporters.target import ModelFacts
from quant.plans.recipes import find_recipe
from quant.program import dialect

SHAPES = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,)}
ROLES = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm"}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that 8 bits hold, a scale and a zero point each token and head."""
    op, grid = torch.ops.quantized_decomposed, (-128, 127, torch.int8)
    scale, zero_point = op.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = op.quantize_per_token(x, scale, zero_point, *grid)
    return op.dequantize_per_token(codes, scale, zero_point, *grid, torch.float32)


class RoundedCaches(Walk):
    """QUANTIZED, but attention computes with rounded queries, keys and values."""

    def prepare(self, node):
        run = super().prepare(node)
        if node.target is not dialect.ATTENTION:
            return run
        return lambda values: run(
            {**values, **{source: rounded(values[source]) for source in node.args[:3]}}
        )


def rounded_logits(made, tokens):
    read = store_reader(made.store)
    walk = RoundedCaches(made.program, read)
    values = walk.begin(torch.from_numpy(tokens))
    with block_pool() as pool:
        for node in walk.order:
            walk.advance(node, [values], pool)
    return values[made.program.output()][0].numpy()


def rms(error):
    return np.sqrt(np.mean(np.square(error, dtype=np.float64)))


@pytest.fixture(scope="module", params=["plain", "window", "heads by layer"])
def config(request, llama_config, openelm_config):
    return {
        "plain": llama_config(),
        "window": llama_config(model_type="mistral", sliding_window=7),
        "heads by layer": openelm_config([3, 4, 6], [1, 2, 3]),
    }[request.param]


def test_a_text_in_pieces_to_the_last_position(config, pte, run_pte, tokens):
    made = pte(config, kv_cache="int8")
    wanted = rounded_logits(made, tokens[:48])
    rounding = rms(wanted - made.quantized_logits(tokens[:48]))
    unit = np.ptp(wanted)
    with run_pte(made.folder) as session:
        every = session.logits(tokens[:48])
        # Of what the rounding itself changes they differ by 0.00025 at most where this was written;
        # an integer may fall on the other side of a half elsewhere.
        assert 5e-5 * unit < rounding < 1e-2 * unit
        assert rms(every - wanted) < 0.05 * rounding
        at = 0
        for size in (21, 9, 1, 1, 15, 1):
            at += size
            row = session.extend(tokens[at - size : at])
            assert np.abs(row - every[at - 1]).max() < 1e-3 * unit
            if size == 9:
                session.logits(tokens[::-1][:11].copy())
        assert at == 48
        with pytest.raises(DeviceError, match="49 tokens do not fit the artifact's context of 48"):
            session.extend(tokens[48:])
        # Beginning anew needs no clearing: no old scale or zero point is used.
        session.reset()
        assert np.abs(session.extend(tokens[:5]) - every[4]).max() < 1e-3 * unit


def test_what_rounding_costs_the_demo_model(cache, tmp_path):
    out = tmp_path / "demo"
    options = ExportOptions("int4", target=TargetOptions(kv_cache="int8"))
    export(open_model(DEMO), [find_target("executorch")], out, options)
    found = verify(out, VerifyOptions(tokens=1024, threads=1, timed=False))
    assert found.lowering.kl_mean < 1e-3
    assert found.lowering.top1_agreement > 0.98  # of 1024 tokens: one is a thousandth
    assert found.stored_weights_equal


def test_what_the_caches_take(pte, llama_config):
    config = llama_config(head_dim=64)
    bytes_of = {}
    for dtype in ("fp32", "int8"):
        arenas = []
        for context in (48, 560):
            made = pte(config, context=context, kv_cache=dtype)
            plans = read_pte(made.folder / "model.pte").program["execution_plan"]
            (plan,) = [plan for plan in plans if plan["name"] == "forward"]
            arenas.append(plan["non_const_buffer_sizes"][1])
        bytes_of[dtype] = arenas[1] - arenas[0]
    numbers = 512 * 2 * 2 * 2 * 64  # tokens, layers, keys and values, heads, width
    assert bytes_of["fp32"] == 4 * numbers
    assert bytes_of["int8"] == numbers + (4 + 1) * numbers // 64


def test_the_manifest_says_it(pte, llama_config):
    made = pte(llama_config(), kv_cache="int8")
    cache = "model.layers.0.self_attn.k_cache"
    assert made.manifest.options == {"kv_cache": "int8"}
    assert made.manifest.states[cache] == "int8[1, 48, 2, 16]"
    assert made.manifest.states[f"{cache}.zero_point"] == "int8[1, 48, 2, 1]"
    assert made.manifest.states[f"{cache}.scale"] == "float32[1, 48, 2, 1]"
    assert any(note.startswith("attention rounds queries") for note in made.manifest.notes)
    operators = {row["operator"] for row in made.manifest.structure["Operators outside delegates"]}
    assert "llama::custom_quantized_sdpa.out" in operators
    assert "llama::custom_sdpa.out" not in operators
    plain = pte(llama_config(), kv_cache="fp32").manifest
    assert plain.states[cache] == "float32[1, 48, 2, 16]"
    assert not any("queries" in note for note in plain.notes)


def test_more_context_fits_the_same_memory():
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    facts = ModelFacts("llama", 64, 64, (4, 4), (2, 2), 256, (257,), None, 100_000)
    largest = {}
    for dtype in ("fp32", "int8"):
        options = TargetOptions(kv_cache=dtype, max_memory=50_000_000)
        with pytest.raises(ExportError) as caught:
            find_target("executorch").check(plan, SHAPES, facts, options)
        largest[dtype] = int(str(caught.value).split("--context ")[1].split()[0])
    rows = 64 * 4  # a rotary table's
    wanted = (2 * 4 * 64 * 4 + rows) / (2 * 4 * (64 + 4 + 1) + rows)
    assert largest["int8"] / largest["fp32"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "int4"}, "--kv-cache int4 is not known to executorch: take fp32 or int8"),
        (
            {"kv_cache": "int8", "lowering": "stock"},
            "--kv-cache needs EdgeForge's own lowering for XNNPACK: leave out --kv-cache or "
            "--lowering stock",
        ),
        (
            {"kv_cache": "int8", "backend": "vulkan"},
            "--kv-cache needs EdgeForge's own lowering for XNNPACK: leave out --kv-cache or "
            "--backend vulkan",
        ),
    ],
)
def test_what_is_refused(cache, checkpoint_of, llama_config, tmp_path, options, words):
    asked = ExportOptions("int4-g32", target=TargetOptions(**options))
    target = [find_target("executorch")]
    with pytest.raises(ExportError) as caught:
        export(checkpoint_of(llama_config()), target, tmp_path / "out", asked)
    assert str(caught.value) == words
    assert not (tmp_path / "out").exists()
