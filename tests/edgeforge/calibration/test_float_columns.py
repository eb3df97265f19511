"""Which columns of activations stay float32: the errors against true products, and the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import edgeforge.calibration.float_columns as columns_module
from edgeforge.calibration.float_columns import (
    COUNTS,
    LARGEST_ERROR,
    choose_count,
    errors_of,
    float_columns,
    texts_of,
)
from edgeforge.model.model import DEMO, open_model
from edgeforge.model.trace import trace
from edgeforge.synth.synthesise import synthesise
from edgeforge.weight_store import quantize
from quant.plans.recipes import find_recipe
from quant.program.ops import round_per_token
from quant.program.rewrite import quantize_program

ROWS, COLUMNS, TOKENS = 48, 160, 64


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(3)


def test_errors_are_those_of_real_products(draw):
    x = torch.randn(TOKENS, COLUMNS, generator=draw)
    x[:, [7, 90]] *= 30
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    weight[:, [7, 90]] /= 10
    product = x @ weight.T
    energy, order = product.square().sum(-1), x.square().mean(0).argsort(descending=True)
    assert set(order[:2].tolist()) == {7, 90}
    found = errors_of(x, energy, weight.square().sum(0), order)
    for count, error in zip(COUNTS, found, strict=True):
        rest = x.clone()
        rest[:, order[:count]] = 0
        kept = x - rest
        true = ((round_per_token(rest) + kept) @ weight.T - product).square().sum(-1)
        assert error == pytest.approx(float((true / energy).mean()), rel=0.25)
    assert choose_count(found) == 2


def test_normal_activations_keep_no_column(draw):
    x, weight = torch.randn(TOKENS, 1024, generator=draw), torch.randn(ROWS, 1024, generator=draw)
    order = x.square().mean(0).argsort(descending=True)
    found = errors_of(x, (x @ weight.T).square().sum(-1), weight.square().sum(0), order)
    assert found[0] < LARGEST_ERROR / 2 and choose_count(found) == 0


def test_a_product_of_zeros_has_no_error():
    x, norms = torch.zeros(4, 8), torch.ones(8)
    assert errors_of(x, torch.zeros(4), norms, torch.arange(8)) == [0.0] * len(COUNTS)


def test_rounding_is_what_xnnpack_does_per_token(draw):
    x = torch.randn(5, 32, generator=draw) * torch.tensor([[1.0], [1e-3], [1e3], [1.0], [0.0]])
    rounded = round_per_token(x)
    span = x.amax(-1).clamp_min(0) - x.amin(-1).clamp_max(0)
    assert bool(((rounded - x).abs().amax(-1) <= 0.51 * span / 255 + 1e-30).all())
    assert bool((rounded[-1] == 0).all())


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    model = open_model(DEMO)
    plan = find_recipe("int4").plan(model.weights.shapes(), model.weights.roles())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        digest = model.checkpoint.digest()
        store = quantize(model.weights, digest, plan, 1, lambda stage, done, size: None)
        yield model, quantize_program(trace(model.spec, 64), plan), store


def test_what_was_found_is_not_measured_again(demo, tmp_path, monkeypatch):
    model, program, store = demo
    monkeypatch.setattr(columns_module, "LARGEST_ERROR", 1e-6)
    monkeypatch.setattr(columns_module, "LEAST_GAIN", 1.0)
    told = []
    texts = texts_of(model, 32)
    found = float_columns(program, store, texts, tmp_path, lambda *done: told.append(done))
    assert found and told[-1][0] == told[-1][1]
    assert all(list(columns) == sorted(set(columns)) for columns in found.values())
    told.clear()
    again = float_columns(program, store, texts, tmp_path, lambda *done: told.append(done))
    assert again == found and not told
    (file,) = tmp_path.iterdir()
    file.write_text("damaged")
    assert float_columns(program, store, texts, tmp_path) == found


def test_a_model_without_a_tokenizer_is_looked_at_on_random_tokens(tmp_path):
    synthesise("tiny-llama", tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    model = open_model(str(tmp_path / "model"))
    texts = texts_of(model, 64)
    assert texts == texts_of(model, 64)
    assert np.shape(texts) == (2, 64)
    assert 0 <= min(map(min, texts)) <= max(map(max, texts)) < model.spec.vocab_size
