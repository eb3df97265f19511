"""Selecting the last position early: the same last row, from a program that does less."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeforge.reference.walk import ReferenceRunner, store_reader
from exporters.last_token import keep_last_token
from quant.program import dialect
from quant.program.program import node_argument, shape_of
from tests.exporters.onnx.vocabulary_cases import CASES
from tests.oracles.lowered_spec import LoweredSpec
from tests.oracles.tiny_families import CONFIGS
from tests.oracles.vocabulary import MIXTURES
from tests.oracles.vocabulary_models import TOKENS, logits_of, program_of, small_model


def calls(program, target):
    return [node for node in program.graph.nodes if node.target is target]


def weight_name(program, node):
    return program.inputs[node_argument(node, 1).name].name


# Its last layer splits a product into a convolution's input and the gate of its result.
CONVOLUTION_LAST = CONFIGS["lfm2"] | {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "conv"],
}


@pytest.mark.parametrize("recipe", ["fp32", "int4-g32"])
def test_the_last_row_is_the_same(build, openelm_config, llama_config, recipe, tokens):
    plain = openelm_config([2, 4], [1, 2]), llama_config(num_hidden_layers=1)
    for config in (*plain, CONVOLUTION_LAST):
        made = build(config, recipe)
        kept = keep_last_token(made.program)
        for length in (1, 2, 13):
            block = torch.from_numpy(tokens[:length])
            every = next(ReferenceRunner(made.program, store_reader(made.store)).logits([block]))
            last = next(ReferenceRunner(kept, store_reader(made.store)).logits([block]))
            assert last.shape == (1, made.program.vocab_size)
            assert np.abs(last[0] - every[-1]).max() < 1e-6 * np.ptp(every)


def test_everything_after_the_last_attention_sees_one_position(build, openelm_config):
    made = build(openelm_config([2, 4], [1, 2]), "int4-g32")
    kept = keep_last_token(made.program)
    seen = {weight_name(kept, n): shape_of(n)[1] for n in calls(kept, dialect.QUANT_LINEAR)}
    layer = "model.layers.{}.{}.weight"
    parts = (
        "self_attn.qk_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    )
    wanted = {layer.format(i, name): -1 for i in (0, 1) for name in parts}
    wanted |= {layer.format(1, name): 1 for name in parts[2:]}
    wanted["model.embed_tokens.weight"] = 1
    assert seen == wanted
    # Two selections: the attention's result and the residual stream beside it.
    sources = {node_argument(node, 0) for node in calls(kept, dialect.LAST)}
    assert len(calls(kept, dialect.LAST)) == len(sources) == 2
    attention = calls(kept, dialect.ATTENTION)[-1]
    assert attention in sources
    assert {n.target for n in sources} == {dialect.ATTENTION, dialect.ADD}
    assert shape_of(kept.output()) == (1, 1, made.program.vocab_size)
    # Caches are still filled from every position.
    assert shape_of(attention)[1] == -1


def test_the_given_program_is_left_as_it_was(build, openelm_config):
    made = build(openelm_config([2, 4], [1, 2]), "int4-g32")
    before = str(made.program.graph)
    shapes = {n.name: shape_of(n) for n in calls(made.program, dialect.QUANT_LINEAR)}
    kept = keep_last_token(made.program)
    assert str(made.program.graph) == before
    assert {n.name: shape_of(n) for n in calls(made.program, dialect.QUANT_LINEAR)} == shapes
    assert not calls(made.program, dialect.LAST)
    assert dict(kept.inputs) == dict(made.program.inputs)
    dialect.check_quantized(made.program)


def test_only_the_lowered_dialect_knows_the_selection(build, openelm_config):
    kept = keep_last_token(build(openelm_config([2], [1]), "fp32").program)
    dialect.check_lowered(kept)
    with pytest.raises(dialect.DialectError, match=r"slice\.Tensor"):
        dialect.check_quantized(kept)


def test_the_last_rows_are_the_same(build, openelm_config, tokens):
    made = build(openelm_config([2, 4], [1, 2]), "int4-g32")
    kept = keep_last_token(made.program, 3)
    for length in (1, 2, 3, 13):
        block = torch.from_numpy(tokens[:length])
        every = next(ReferenceRunner(made.program, store_reader(made.store)).logits([block]))
        last = next(ReferenceRunner(kept, store_reader(made.store)).logits([block]))
        assert last.shape == (min(3, length), made.program.vocab_size)
        assert np.abs(last - every[-3:]).max() < 1e-6 * np.ptp(every)
    dialect.check_lowered(kept, 3)
    with pytest.raises(dialect.DialectError, match="not the logits of 4 positions"):
        dialect.check_lowered(kept, 4)
    with pytest.raises(dialect.DialectError, match="not one position's logits"):
        dialect.check_lowered(kept)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("positions", [1, 3])
def test_a_mixture_is_computed_for_the_last_positions(name, positions, tmp_path):
    spec = MIXTURES[name]
    model, program = small_model(spec, tmp_path / "m"), program_of(spec)
    kept = keep_last_token(program, positions)
    every = logits_of(model, program)
    last = logits_of(model, kept)
    assert last.shape == (positions, spec.vocab_size) and len(TOKENS) > positions
    assert np.abs(last - every[-positions:]).max() < 1e-6 * np.ptp(every)
    expected = 1 if positions == 1 else -1
    lengths = {  # of what each layer's experts read
        weight_name(kept, node).split(".")[2]: shape_of(node)[1]
        for node in calls(kept, dialect.LINEAR)
        if ".mlp.experts." in weight_name(kept, node)
    }
    final = str(len(spec.layers) - 1)
    assert lengths == {layer: expected if layer == final else -1 for layer in lengths}
    # What a mixture reads is selected before the router and never within a branch. Queries of
    # attention's experts are needed of all tokens, so of its router the weights are selected.
    selected = {node_argument(node, 0).target for node in calls(kept, dialect.LAST)}
    routed = {dialect.ROUTE} if spec.layers[-1].attention_experts else set()
    assert selected <= {dialect.ATTENTION, dialect.ADD, dialect.EMBEDDING} | routed
    if routed:
        outputs = [
            node for node in calls(kept, dialect.CHOSEN_SLOTS) if shape_of(node)[1] == expected
        ]
        assert len(outputs) >= spec.layers[-1].attention_experts
        queries = [
            shape_of(node)[1]
            for node in calls(kept, dialect.LINEAR)
            if f"layers.{final}.self_attn.experts." in weight_name(kept, node)
            and weight_name(kept, node).endswith("q_proj.weight")
        ]
        assert queries == [-1] * spec.layers[-1].attention_experts


def test_a_mixture_of_experts_is_computed_for_one_position(tmp_path, tokens):
    """The experts of the last layer run for the token that is kept, and no other layer's do."""
    case = CASES["mixture"]
    source = LoweredSpec(case.spec(), tmp_path, "int4-g32")
    kept = keep_last_token(source.program)
    for target in (dialect.ROUTE, dialect.CHOSEN, dialect.COMBINE):
        of_layers = [shape_of(node)[1] for node in calls(kept, target)]
        counts = [layer.experts for layer in case.layers if layer.experts]
        first, last = counts if target is dialect.CHOSEN else (1, 1)
        assert of_layers == [-1] * first + [1] * last
    reader = store_reader(source.store)
    block = torch.from_numpy(tokens[:13]) % case.spec().vocab_size
    every = next(ReferenceRunner(source.program, reader).logits([block]))
    last_row = next(ReferenceRunner(kept, reader).logits([block]))
    assert np.abs(last_row[0] - every[-1]).max() < 1e-6 * np.ptp(every)
