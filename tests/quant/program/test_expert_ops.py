"""What a mixture's operators compute, held against NumPy written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.program import expert_ops


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: np.ndarray) -> np.ndarray:
    made = np.exp(row - row.max())
    return made / made.sum()


def routed(row: np.ndarray, chosen: int, normalized: bool) -> np.ndarray:
    """One token's weights; of equal logits the lower index goes first."""
    shares = softmax(row)
    kept = sorted(range(len(row)), key=lambda index: (-row[index], index))[:chosen]
    made = np.zeros_like(row)
    made[kept] = shares[kept] / (shares[kept].sum() if normalized else 1)
    return made


@given(st.integers(0, 9), st.integers(1, 6), st.integers(0, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_route_keeps_the_largest_shares(tokens, experts, others, normalized):
    chosen = max(1, experts - others)
    logits = random(1, tokens, experts)
    found = expert_ops.route(logits, chosen, normalized)
    assert found.shape == logits.shape
    for row, made in zip(logits[0].double().numpy(), found[0].numpy(), strict=True):
        np.testing.assert_allclose(made, routed(row, chosen, normalized), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_equal_logits_the_lowest_index_goes_first(dtype):
    logits = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]]], dtype=dtype)
    found = expert_ops.route(logits, 2, True)
    assert found.dtype == dtype
    assert found.tolist() == [[[0, 0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0, 0]]]
    mixed = expert_ops.route_sparse_mixer(logits, 0.01)
    assert [row.nonzero().flatten().tolist() for row in mixed[0]] == [[1, 2], [0, 1]]


def mixed(row: np.ndarray, jitter: float) -> np.ndarray:
    """SparseMixer's two weights of one token, as section 2.2 of arXiv 2409.12136 states them."""
    made, left = np.zeros_like(row), row.copy()
    for _ in range(2):
        best = int(left.argmax())
        near = [
            index
            for index in range(len(row))
            if left[index] > -np.inf
            and (left[best] - row[index]) / max(abs(row[index]), left[best]) <= 2 * jitter
        ]
        made[best] = np.exp(row[best]) / sum(np.exp(row[index]) for index in near)
        left[best] = -np.inf
    return made


@given(st.integers(1, 9), st.integers(2, 9), st.sampled_from([0.01, 0.2, 0.6]))
@settings(max_examples=40, deadline=None)
def test_sparse_mixer_weighs_the_two_best_among_their_candidates(tokens, experts, jitter):
    logits = 2 * random(1, tokens, experts, seed=tokens * experts)
    found = expert_ops.route_sparse_mixer(logits, jitter)[0].numpy()
    for row, made in zip(logits[0].double().numpy(), found, strict=True):
        np.testing.assert_allclose(made, mixed(row, jitter), rtol=1e-5, atol=1e-7)


def weights_of(tokens: int, experts: int, idle: int | None = None) -> torch.Tensor:
    """Random weights, two for each token; the expert ``idle`` has none."""
    logits = random(1, tokens, experts, seed=3)
    if idle is not None:
        logits[..., idle] = -1e4
    return expert_ops.route(logits, min(2, experts), False)


@pytest.mark.parametrize("tokens", [0, 1, 3, 1000])
def test_chosen_tokens_are_those_with_a_weight_in_their_order(tokens):
    x, weights = random(1, tokens, 5), weights_of(tokens, 4, idle=2)
    for expert in range(4):
        found = expert_ops.chosen_tokens(x, weights, expert)
        rows = [t for t in range(tokens) if weights[0, t, expert] != 0]
        assert torch.equal(found, x[:, rows])
    assert expert_ops.chosen_tokens(x, weights, 2).shape == (1, 0, 5)


@pytest.mark.parametrize("tokens", [0, 1, 3, 1000])
def test_a_mixture_is_the_weighted_sum_over_all_experts(tokens):
    x, weights = random(1, tokens, 6), weights_of(tokens, 4, idle=1)
    gate_up, down = random(4, 10, 6, seed=10), random(4, 7, 5, seed=20)
    found = expert_ops.experts(x, weights, gate_up, down, "gelu_tanh")
    wide = x[0].double().numpy()
    expected = np.zeros((tokens, 7))
    for expert in range(4):
        gate, up = np.split(wide @ gate_up[expert].double().numpy().T, 2, -1)
        active = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        result = (active * up) @ down[expert].double().numpy().T
        expected += weights[0, :, expert, None].double().numpy() * result
    assert found.shape == (1, tokens, 7)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_an_expert_that_no_token_chose_is_not_computed():
    x, weights = random(1, 8, 6), weights_of(8, 4, idle=1)
    gate_up, down = random(4, 10, 6), random(4, 6, 5)
    gate_up[1] = torch.nan
    assert torch.isfinite(expert_ops.experts(x, weights, gate_up, down, "silu")).all()


def test_combine_adds_each_result_where_its_token_stands():
    weights = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [5.0, 7.0]]])
    results = [torch.tensor([[[1.0], [10.0]]]), torch.tensor([[[100.0], [1000.0]]])]
    assert expert_ops.combine(weights, results).tolist() == [[[200.0], [3.0], [7050.0]]]


def slots_by_hand(row: np.ndarray) -> list[int]:
    """The experts that a token chose, in ascending order: the slots that they have."""
    return [expert for expert, weight in enumerate(row) if weight != 0]


@pytest.mark.parametrize("tokens", [0, 1, 3, 1000])
def test_slots_stand_by_head_and_then_by_ascending_expert(tokens):
    chosen, heads, width = 2, 3, 4
    weights = weights_of(tokens, 5, idle=2)
    results = [
        random(1, int((weights[0, :, expert] != 0).sum()), heads * width, seed=expert)
        for expert in range(5)
    ]
    found = expert_ops.slots(weights, results, chosen, heads)
    assert found.shape == (1, tokens, chosen * heads * width)
    placed = found[0].numpy().reshape(tokens, heads, chosen, width)
    met = [0] * 5
    for token in range(tokens):
        for slot, expert in enumerate(slots_by_hand(weights[0, token].numpy())):
            row = results[expert][0, met[expert]].numpy().reshape(heads, width)
            np.testing.assert_array_equal(placed[token, :, slot], row)
            met[expert] += 1
    # Each expert reads back what it wrote.
    for expert, result in enumerate(results):
        own = expert_ops.chosen_slots(found, weights, expert, chosen, heads)
        assert torch.equal(own, result)
    assert results[2].shape[1] == 0


def test_a_slot_that_no_expert_fills_is_zero():
    weights = torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]])
    results = [torch.full((1, n, 2), float(value)) for n, value in ((1, 1), (1, 2), (1, 3))]
    found = expert_ops.slots(weights, results, 2, 1)
    assert found.tolist() == [[[2, 2, 0, 0], [1, 1, 3, 3]]]
    assert expert_ops.chosen_slots(found, weights, 1, 2, 1).tolist() == [[[2, 2]]]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_mixture_of_heads_is_each_tokens_own_products(tokens):
    chosen, heads, width = 2, 3, 4
    x, weights = random(1, tokens, 6), weights_of(tokens, 4, idle=1)
    into, out = random(4, heads * width, 6, seed=10), random(4, 6, heads * width, seed=20)
    queries = expert_ops.expert_queries(x, weights, into, chosen, heads)
    made = expert_ops.expert_outputs(queries, weights, out, chosen, heads)
    assert queries.shape == (1, tokens, chosen * heads * width) and made.shape == (1, tokens, 6)
    placed = queries[0].numpy().reshape(tokens, heads, chosen, width)
    for token, row in enumerate(x[0].double().numpy()):
        shares = weights[0, token].double().numpy()
        expected = np.zeros(6)
        for slot, expert in enumerate(slots_by_hand(shares)):
            query = into[expert].double().numpy() @ row
            expected += shares[expert] * (out[expert].double().numpy() @ query)
            own = query.reshape(heads, width)
            np.testing.assert_allclose(placed[token, :, slot], own, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(made[0, token].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_an_attention_expert_that_no_token_chose_is_not_computed():
    x, weights = random(1, 8, 6), weights_of(8, 4, idle=1)
    into, out = random(4, 4, 6), random(4, 6, 4)
    into[1], out[1] = torch.nan, torch.nan
    queries = expert_ops.expert_queries(x, weights, into, 2, 2)
    made = expert_ops.expert_outputs(queries, weights, out, 2, 2)
    assert bool(queries.isfinite().all()) and bool(made.isfinite().all())
