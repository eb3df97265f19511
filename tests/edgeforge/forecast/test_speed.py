"""Bounds of speed, against counts by hand for Llama-3.2-1B's shape."""

import pytest

from edgeforge.families.facts import facts_of
from edgeforge.families.registry import read_spec
from edgeforge.forecast.speed import CacheRows, Work, work_of
from edgeforge.synth.synthesise import PRESETS
from exporters.options import TargetOptions
from exporters.registry import find_target
from quant.plans.recipes import find_recipe

LAYERS = 16 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192)
TABLE = 128256 * 2048
NORMS = 33 * 2048


def work(preset, recipe, target="onnx", context=4096):
    spec = read_spec(PRESETS[preset].config_json("bfloat16"))
    shapes = {name: weight.shape for name, weight in spec.weights.items()}
    roles = {name: weight.role for name, weight in spec.weights.items()}
    plan = find_recipe(recipe).plan(shapes, roles)
    facts = facts_of(spec, context)
    footprint = find_target(target).footprint(plan, shapes, facts, TargetOptions())
    return work_of(plan, shapes, spec, footprint)


def test_a_token_reads_every_matrix_once_and_a_tied_table_as_head():
    found = work("llama-3.2-1b", "int4-g32")
    assert found.weights == (LAYERS + TABLE) * 4.5 / 8 + NORMS * 4
    assert found.operations == 2 * LAYERS
    assert found.rows == (CacheRows(2 * 16 * 8 * 64 * 4, 0),)
    assert found.run_tokens == 128
    (row,) = work("llama-3.2-1b", "int4-g32", "coreml").rows
    assert row.nbytes == found.rows[0].nbytes / 2


def test_of_an_embedding_that_is_not_the_head_one_row_is_read():
    layers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    expected = (layers + 128256 * 4096) * 4.5 / 8 + 65 * 4096 * 4
    assert work("llama-3-8b", "int4-g32").weights == expected


def test_a_window_bounds_what_is_read_of_the_caches():
    found = work("mistral-7b", "int4-g32", context=8192)
    assert [each.window for each in found.rows] == [4096]
    assert found.read_at(8191) == found.read_at(4096) > found.read_at(4095)
    full = work("llama-3.2-1b", "int4-g32")
    assert full.read_at(4095) == full.weights + 4095 * full.rows[0].nbytes


def test_the_lower_bound_counts():
    one = Work(weights=1000, rows=(CacheRows(10.0, 0),), operations=500, run_tokens=64)
    assert one.decode_bound(1e6, 0) == 1000.0
    assert one.decode_bound(1e6, 100) == 500.0
    assert one.prefill_bound(1e6, None) == 64_000.0
    assert one.prefill_bound(1e6, 1e6) == 2000.0
    assert one.prefill_bound(1e6, 1e9) == 64_000.0
    assert one.prefill_bound(None, 1e6) == 2000.0
    assert one.prefill_bound(None, None) is None


def test_published_speeds_of_the_same_shape_are_below_these_bounds():
    # Llama-3.2-1B at 4 bits in groups of 32, head at 8 bits: 50.2 tokens/s at 76.8 GB/s.
    assert work("llama-3.2-1b", "int4-g32").decode_bound(76.8e9, 64) > 50.2
    assert work("llama-3.2-1b", "fp16").decode_bound(76.8e9, 0) == pytest.approx(31.1, abs=0.1)


def test_of_a_mixture_the_chosen_experts_are_read():
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    expert, router = 3 * 4096 * 14336, 8 * 4096
    found = work("mixtral-8x7b", "int4-g32")
    matrices = 32 * (attention + 2 * expert) + 32000 * 4096
    assert found.weights == matrices * 4.5 / 8 + (32 * router + 65 * 4096) * 4
    assert found.operations == 2 * 32 * (attention + 2 * expert + router)


def test_of_a_mixture_of_heads_the_chosen_queries_and_outputs_are_read():
    heads, feed_forward = 2 * 2048 * 2048, 3 * 2048 * 5632
    keys, routers = 2 * 2048 * 2048, 2 * 8 * 2048
    found = work("jetmoe-8b", "int4-g32")
    matrices = 24 * (keys + 2 * (heads + feed_forward)) + 32000 * 2048
    # Two routers, two norms and two biases in each layer, and the last norm.
    assert found.weights == matrices * 4.5 / 8 + (24 * (routers + 4 * 2048) + 2048) * 4
    assert found.operations == 2 * 24 * (keys + 2 * (heads + feed_forward) + routers)
    # The caches hold one key and one value for all experts.
    assert found.rows == (CacheRows(2 * 24 * 16 * 128 * 4, 0),)
