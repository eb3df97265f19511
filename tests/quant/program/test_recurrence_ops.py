"""The recurrence against NumPy written from the papers' formulas, and its states."""

import numpy as np
import pytest
import torch

from quant.program import recurrence_ops, token_ops
from quant.program.recurrence_ops import recurrence, token_shift

B, T, H, G, N, P = 2, 7, 6, 3, 4, 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(form: str) -> list[torch.Tensor | None]:
    """Query, key, value, log decay, bonus, beta."""
    groups = H if form.startswith("rwkv") else G
    q, k, v = random(B, T, groups, N), random(B, T, groups, N, seed=1), random(B, T, H, P, seed=2)
    shape = {"rwkv5": (H, N), "rwkv6": (B, T, H, N)}.get(form, (B, T, H))
    decay = -random(*shape, seed=3).exp() * 0.3
    bonus = random(H, N, seed=4) if form.startswith("rwkv") else None
    beta = random(B, T, H, seed=5).sigmoid() if form == "delta" else None
    return [q, k, v, decay, bonus, beta]


def rwkv(q, k, v, decay, bonus) -> np.ndarray:
    """``wkv`` of Eagle and Finch, as sums over all earlier tokens (arXiv 2404.05892, eq. 14)."""
    out = np.zeros((B, T, H, P))
    decay = np.broadcast_to(decay, (B, T, H, N))
    for b, t, h in np.ndindex(B, T, H):
        wkv = np.outer(bonus[h] * k[b, t, h], v[b, t, h])
        for i in range(t):
            kept = np.exp(decay[b, i + 1 : t, h].sum(0))
            wkv += np.outer(kept * k[b, i, h], v[b, i, h])
        out[b, t, h] = q[b, t, h] @ wkv
    return out


def mamba(q, k, v, decay) -> np.ndarray:
    """``L * (C B^T) X`` of the state space dual (arXiv 2405.21060, section 3)."""
    out = np.zeros((B, T, H, P))
    for b, h in np.ndindex(B, H):
        total = np.cumsum(decay[b, :, h])
        mask = np.tril(np.exp(total[:, None] - total[None]))
        group = h // (H // G)
        out[b, :, h] = (mask * (q[b, :, group] @ k[b, :, group].T)) @ v[b, :, h]
    return out


def delta(q, k, v, decay, beta) -> np.ndarray:
    """``S_t = S_{t-1} a_t (I - b_t k_t k_t^T) + b_t v_t k_t^T`` (arXiv 2412.06464, eq. 10)."""
    out = np.zeros((B, T, H, P))
    for b, h in np.ndindex(B, H):
        state, group = np.zeros((P, N)), h // (H // G)
        for t in range(T):
            key = k[b, t, group]
            forget = np.eye(N) - beta[b, t, h] * np.outer(key, key)
            state = np.exp(decay[b, t, h]) * state @ forget
            state += beta[b, t, h] * np.outer(v[b, t, h], key)
            out[b, t, h] = state @ q[b, t, group]
    return out


def expected(form: str, given: list[torch.Tensor | None]) -> np.ndarray:
    q, k, v, decay, bonus, beta = (None if x is None else x.double().numpy() for x in given)
    if form == "mamba":
        return mamba(q, k, v, decay)
    return delta(q, k, v, decay, beta) if form == "delta" else rwkv(q, k, v, decay, bonus)


@pytest.mark.parametrize("form", ["rwkv5", "rwkv6", "mamba", "delta"])
def test_a_recurrence_is_what_the_paper_says(form: str) -> None:
    given, memory = operands(form), torch.full((B, H, N, P), torch.nan)
    found = recurrence(*given, memory, torch.tensor([0]))
    np.testing.assert_allclose(found.numpy(), expected(form, given), rtol=1e-4, atol=1e-5)
    assert memory.isfinite().all(), "a text's first call ignores what the memory held"


@pytest.mark.parametrize("form", ["rwkv5", "rwkv6", "mamba", "delta"])
def test_a_text_in_several_calls_equals_one_call(form: str) -> None:
    given, whole = operands(form), torch.zeros(B, H, N, P)
    once, memory = recurrence(*given, whole, torch.tensor([0])), torch.zeros(B, H, N, P)
    made = []
    for start, stop in ((0, 3), (3, 4), (4, T)):
        part = [x[:, start:stop] if x is not None and x.shape[:2] == (B, T) else x for x in given]
        made.append(recurrence(*part, memory, torch.tensor([start])))
    assert torch.equal(torch.cat(made, 1), once)
    assert torch.equal(memory, whole)


def test_a_shift_gives_each_token_the_one_before() -> None:
    x, recent = random(B, T, N), torch.full((B, N, 1), torch.nan)
    first = token_shift(x[:, :4], recent, torch.tensor([0]))
    assert torch.equal(first[:, 0], torch.zeros(B, N))
    assert torch.equal(first[:, 1:], x[:, :3])
    rest = token_shift(x[:, 4:], recent, torch.tensor([4]))
    assert torch.equal(rest, x[:, 3:-1])
    assert torch.equal(recent[..., 0], x[:, -1])


def test_factors_belong_to_columns_or_heads() -> None:
    x = random(1, T, H, P)
    np.testing.assert_array_equal(
        token_ops.gain(x, random(P)).numpy(), x.numpy() * random(P).numpy()
    )
    heads = random(H, 1)
    assert torch.equal(token_ops.gain(x, heads)[0, 2, 3], x[0, 2, 3] * heads[3])


def test_the_unit_norm_adds_epsilon_to_the_sum_of_squares() -> None:
    x = random(3, 8)
    wide = x.double().numpy()
    found = token_ops.l2_norm(x, 0.5).numpy()
    np.testing.assert_allclose(found, wide / np.sqrt((wide**2).sum(-1, keepdims=True) + 0.5), 1e-5)


def test_fake_kernels_have_the_shapes_of_the_results() -> None:
    for form in ("rwkv5", "rwkv6", "mamba", "delta"):
        given = operands(form)
        meta = [None if x is None else x.to("meta") for x in given]
        state, at = torch.zeros(B, H, N, P, device="meta"), torch.zeros(1, device="meta")
        assert recurrence(*meta, state, at).shape == (B, T, H, P)
    assert recurrence_ops.token_shift(meta[0], state, at).shape == meta[0].shape
