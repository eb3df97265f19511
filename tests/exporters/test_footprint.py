"""Memory estimated before any work, against sizes counted by hand and what a runtime takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

import edgeforge.trace_and_quantize as trace_and_quantize
from edgeforge.export_options import ExportOptions
from edgeforge.pipeline import export
from exporters.errors import ExportError
from exporters.footprint import Footprint, RuntimeCosts, check_memory, estimate
from exporters.options import TargetOptions
from exporters.recurrence_size import RecurrenceSize
from exporters.registry import find_target
from exporters.runtime_memory import UNLIMITED
from exporters.target import ModelFacts
from quant.plans.recipes import find_recipe

FACTS = ModelFacts("llama", 64, 16, (4, 4), (2, 1), 256, (257,), None, 100)
SHAPES = {
    "model.embed_tokens.weight": (320, 64),
    "model.layers.0.mlp.gate_up_proj.weight": (192, 64),
    "model.norm.weight": (64,),
}
ROLES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.mlp.gate_up_proj.weight": "linear",
    "model.norm.weight": "norm",
}
COSTS = RuntimeCosts(cache_element=2, tied_copies=2, run_tokens=8)


@pytest.fixture
def counted():
    return estimate(find_recipe("int8").plan(SHAPES, ROLES), SHAPES, FACTS, COSTS)


def test_what_is_counted(counted):
    # Codes, a bfloat16 scale a row, and the norm as it is stored.
    table, matrix = 320 * 64 + 320 * 2, 192 * 64 + 192 * 2
    norm = counted.weights - 2 * table - matrix
    assert norm in (64 * 2, 64 * 4)
    assert counted.caches_per_token == 2 * (2 + 1) * 16 * 2
    assert counted.buffers_at(0) == 4 * (8 * (3 * 64 + 2 * 192) + 320)
    assert counted.total(10) == counted.total(0) + 10 * (192 + 16 * 4)


def test_an_untied_head_is_a_weight_of_its_own():
    shapes = {**SHAPES, "lm_head.weight": (320, 64)}
    plan = find_recipe("int8").plan(shapes, {**ROLES, "lm_head.weight": "head"})
    untied = estimate(plan, shapes, FACTS, COSTS)
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    assert untied.weights == estimate(plan, SHAPES, FACTS, COSTS).weights


@pytest.mark.parametrize("memory", [3000, 3001, 3002, 3003, 4096, 999_999])
def test_the_largest_context_is_the_last_that_fits(memory):
    footprint = Footprint(1000, 500, 2.5, 0.75)
    largest = footprint.largest_context(memory)
    assert footprint.total(largest) <= memory < footprint.total(largest + 1)


@pytest.mark.parametrize("memory", range(3000, 3200, 7))
def test_where_contexts_are_padded_the_largest_is_a_multiple(memory):
    footprint = Footprint(1000, 500, 2.5, 0.75, context_multiple=32)
    assert footprint.caches_at(33) == footprint.caches_at(64) == 160
    largest = footprint.largest_context(memory)
    assert largest % 32 == 0
    assert footprint.total(largest) <= memory < footprint.total(largest + 1)


def test_the_neural_engines_caches_are_padded():
    roles, shapes = ROLES, SHAPES
    plan = find_recipe("int8").plan(shapes, roles)
    target, facts = find_target("coreml"), replace(FACTS, context=33)
    gpu = target.footprint(plan, shapes, facts, TargetOptions())
    ane = target.footprint(plan, shapes, facts, TargetOptions(profile="ane"))
    assert gpu.caches_at(33) == 2 * (2 + 1) * 16 * 2 * 33
    assert ane.caches_at(33) == 2 * (2 + 1) * 32 * 2 * 64  # heads of 16 columns, and 33 positions


def test_what_is_said():
    footprint = Footprint(2_000_000, 300_000, 1000.0, 0.0)
    check_memory("onnx", footprint, 700, None)
    check_memory("onnx", footprint, 700, 3_000_000)
    with pytest.raises(ExportError) as caught:
        check_memory("onnx", footprint, 701, 3_000_000)
    assert str(caught.value) == (
        "onnx would need 3.0 MB for a context of 701 tokens (weights 2.0 MB, caches 0.7 MB, "
        "buffers 0.3 MB), and --max-memory is 3.0 MB: export with --context 700 or less"
    )
    with pytest.raises(ExportError, match="not even its weights fit: choose a recipe of fewer"):
        check_memory("onnx", footprint, 2, 1_999_999)
    with pytest.raises(ExportError, match="leave no room for a context"):
        check_memory("onnx", footprint, 2, 2_300_500)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_refused_before_any_work(target, cache, tmp_path, monkeypatch, checkpoint_of, llama_config):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the refusal")

    model = checkpoint_of(llama_config())
    with monkeypatch.context() as patch:
        patch.setattr(type(model.checkpoint), "digest", work)
        patch.setattr(trace_and_quantize, "quantize", work)
        asked = TargetOptions(max_memory=1_500_000)
        options = ExportOptions("int4", context=4096, target=asked)
        words = rf"^{target} would need .* export with --context \d+ or less$"
        with pytest.raises(ExportError, match=words) as caught:
            export(model, [find_target(target)], tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    largest = int(str(caught.value).split("--context ")[1].split()[0])
    fitting = ExportOptions("int4", context=largest, target=asked)
    assert export(model, [find_target(target)], tmp_path / "out", fitting)


def test_layers_without_attention_have_no_caches_and_convolutions_have_states(counted):
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    facts = replace(FACTS, num_heads=(4, 0), num_kv_heads=(2, 0), recent=64 * 2, rope_width=16 + 8)
    mixed = estimate(plan, SHAPES, facts, replace(COSTS, state_element=2))
    assert mixed.caches_per_token == 2 * 2 * 16 * 2
    assert mixed.caches_at(10) == 10 * mixed.caches_per_token + 64 * 2 * 2
    assert mixed.buffers_per_token == counted.buffers_per_token + 8 * 4
    memory = mixed.total(50)
    assert mixed.largest_context(memory) == 50


def test_experts_and_the_rows_of_those_that_a_token_chose(counted):
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    facts = replace(FACTS, experts=8, chosen_experts=2)
    one_by_one = estimate(plan, SHAPES, facts, COSTS)
    assert one_by_one.buffers == counted.buffers + 8 * (3 * 64 + 2 * 8) * 4
    together = estimate(plan, SHAPES, facts, replace(COSTS, expert_rows=4))
    assert together.buffers == one_by_one.buffers + 8 * 4 * 2 * 64 * 4
    assert together.weights == counted.weights


def test_the_queries_of_all_chosen_experts_are_wider_than_one_experts_product(counted):
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    widest = max(shape[0] for name, shape in SHAPES.items() if "embed" not in name)
    facts = replace(FACTS, num_heads=(4, 40), num_kv_heads=(2, 10), experts=8, chosen_experts=4)
    made = estimate(plan, SHAPES, facts, COSTS)
    wider = 40 * FACTS.head_dim - widest
    assert wider > 0
    assert made.buffers == counted.buffers + 8 * (3 * 64 + 2 * 8 + 2 * wider) * 4


def test_recurrences_are_counted_once_for_the_largest(counted):
    plan = find_recipe("int8").plan(SHAPES, ROLES)
    small, large = RecurrenceSize(4, 2, 8, 12), RecurrenceSize(4, 4, 8, 12, replaces=True)
    facts = replace(FACTS, recurrences=(small, large))
    loop = estimate(plan, SHAPES, facts, COSTS)
    # Queries and keys, values and results, a decay of each head, and the delta rule's betas.
    assert loop.buffers == counted.buffers + 8 * (2 * 4 * 8 + 2 * 4 * 12 + 4 + 4) * 4
    pairs = replace(COSTS, recurrence=lambda size, tokens: size.heads * tokens**2)
    assert estimate(plan, SHAPES, facts, pairs).buffers == loop.buffers + 4 * 8**2 * 4


def test_a_model_of_which_nothing_grows_fits_at_any_context_or_at_none():
    footprint = Footprint(1000, 100, 0.0, 0.0, states=50)
    assert footprint.largest_context(1150) == UNLIMITED
    assert footprint.largest_context(1149) == 0
    with pytest.raises(ExportError, match="leave no room for a context: choose a recipe of fewer"):
        check_memory("coreml", footprint, 100, 1149)


def test_core_ml_advises_shorter_calls_for_a_recurrence():
    plan, target = find_recipe("int8").plan(SHAPES, ROLES), find_target("coreml")
    large = RecurrenceSize(4, 4, 64, 64, by_row=True)
    facts = replace(FACTS, recurrences=(large,))
    options = TargetOptions(max_memory=2_000_000)
    target.check(plan, SHAPES, FACTS, options)
    words = r"--max-memory is 2\.0 MB: .*, or prefill fewer tokens at a time \(--chunk\)$"
    with pytest.raises(ExportError, match=words):
        target.check(plan, SHAPES, facts, options)
    target.check(plan, SHAPES, facts, replace(options, chunk="8"))
