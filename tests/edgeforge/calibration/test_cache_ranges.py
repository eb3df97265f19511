"""How far caches reach: against transformers' own caches, once, and where it cannot be said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import edgeforge.calibration.cache_ranges as ranges_module
from edgeforge.calibration.cache_ranges import cache_ranges
from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.weight_store import quantize
from quant.errors import QuantizationError
from quant.plans.recipes import find_recipe
from quant.program.rewrite import quantize_program

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
BLOCKS = np.random.default_rng(0).integers(0, 320, (6, 24)).tolist()


@pytest.fixture(scope="module")
def made(hugging_face, tmp_path_factory):
    """A checkpoint of transformers', its program and its store of float32."""
    root = tmp_path_factory.mktemp("ranges")
    folder = hugging_face.save(root / "model", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        yield folder, *opened(folder)


def opened(folder, context=24):
    model = open_model(str(folder))
    plan = find_recipe("fp32").plan(model.weights.shapes(), model.weights.roles())
    digest = model.checkpoint.digest()
    store = quantize(model.weights, digest, plan, 1, lambda stage, done, size: None)
    return quantize_program(trace(model.spec, context), plan), store


def test_they_hold_every_key_and_value_of_the_text(made, tmp_path):
    folder, program, store = made
    told = []
    found = cache_ranges(
        program, store, BLOCKS, tmp_path, lambda done, size: told.append((done, size))
    )
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        caches = oracle(torch.tensor(BLOCKS), use_cache=True).past_key_values
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert len(found) == 6
    for index, layer in enumerate(caches.layers):
        at = f"model.layers.{index}.self_attn"
        values = layer.values.abs().amax((0, 2)).numpy()
        np.testing.assert_allclose(found[f"{at}.v_cache"], values, rtol=1e-4)
        keys = layer.keys.numpy()
        lengths = np.hypot(keys[..., :8], keys[..., 8:]).max((0, 2))
        np.testing.assert_allclose(found[f"{at}.k_cache"], np.tile(lengths, 2), rtol=1e-4)
        # Wherever a text lies, its keys are within: a rotation keeps a pair's length.
        assert (np.abs(keys).max((0, 2)) <= found[f"{at}.k_cache"] * (1 + 1e-4)).all()


def test_what_was_measured_is_not_measured_again(made, tmp_path, monkeypatch):
    _, program, store = made
    first = cache_ranges(program, store, BLOCKS, tmp_path)
    (file,) = tmp_path.iterdir()

    def work(*_: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(ranges_module, "store_reader", work)
        again = cache_ranges(program, store, BLOCKS, tmp_path)
        assert again.keys() == first.keys()
        assert all((again[name] == first[name]).all() for name in first)
        with pytest.raises(AssertionError, match="measured again"):
            cache_ranges(program, store, BLOCKS[:3], tmp_path)
    content = file.read_bytes()
    at = content.index(b"0.") + 2
    changed = content[:at] + (b"7" if content[at : at + 1] != b"7" else b"3") + content[at + 1 :]
    for damaged in (content[:100], changed):
        file.write_bytes(damaged)
        whole = cache_ranges(program, store, BLOCKS, tmp_path)
        assert all((whole[name] == first[name]).all() for name in first)
        assert file.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_no_more_of_a_text_is_looked_at_than_it_takes(made, tmp_path, monkeypatch):
    _, program, store = made
    monkeypatch.setattr(ranges_module, "RANGE_TOKENS", 48)
    part = cache_ranges(program, store, BLOCKS, tmp_path)
    same = cache_ranges(program, store, BLOCKS[:2], tmp_path)
    assert all((part[name] == same[name]).all() for name in part)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_not_finite_is_named(made, tmp_path, monkeypatch):
    _, program, store = made
    read = ranges_module.store_reader(store)

    def broken(given):
        value = read(given)
        return value * np.inf if given.name == "model.layers.1.self_attn.qk_proj.weight" else value

    monkeypatch.setattr(ranges_module, "store_reader", lambda store: broken)
    with pytest.raises(QuantizationError) as caught:
        cache_ranges(program, store, BLOCKS, tmp_path)
    assert "keys of model.layers.1.self_attn are NaN or infinite" in str(caught.value)
    assert not list(tmp_path.iterdir())
