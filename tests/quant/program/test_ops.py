"""The operators' meaning, held against NumPy written from their papers, and their fake kernels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

from quant.formats.formats import parse_format
from quant.program import ops, state_ops, token_ops
from quant.quantizers.rtn import RTN

FORMATS = ("int4-g32", "int4-g32-asym", "int4-pc", "int8-pc", "int8-g32-asym")
FORMATS += ("int2-g32", "int2-g32-asym", "int3-g32-asym", "int6-pc")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=tolerance, atol=tolerance)


def decode(made, format: str, columns: int) -> np.ndarray:
    """float64 ``[rows, columns]`` of stored parts, in words of the format's definition."""
    bits = int(format[3])
    groups = made.scale.shape[1]
    codes = np.zeros((len(made.codes), columns))
    zero = np.full((len(codes), groups), 2.0 ** (bits - 1))
    for target, packed in ((codes, made.codes), (zero, made.zero_point)):
        if packed is None:
            continue
        stream = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
        for column in range(target.shape[1]):
            code = stream[:, column * bits : (column + 1) * bits]
            target[:, column] = code @ (1 << np.arange(bits))
    width = columns // groups
    return (codes - zero.repeat(width, 1)) * made.scale.double().numpy().repeat(width, 1)


def test_embedding_takes_rows():
    table, tokens = random(11, 5), torch.tensor([[3, 10, 3], [0, 1, 2]])
    same(ops.embedding(tokens, table), table.numpy()[tokens.numpy()])


def test_linear_multiplies_by_the_transpose():
    x, weight = random(2, 3, 7), random(5, 7, seed=1)
    same(ops.linear(x, weight), x.double().numpy() @ weight.double().numpy().T)


@pytest.mark.parametrize("shape", [(2, 3, 16), (1, 4, 3, 16)])
def test_rms_norm_divides_by_the_root_of_the_mean_square(shape):
    x, weight = 3 * random(*shape), random(16, seed=1)
    wide = x.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * weight.numpy()
    same(ops.rms_norm(x, weight, 0.1), expected)


def test_rms_norm_computes_in_float32_for_narrow_inputs():
    x = torch.full((1, 1, 4), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
    out = ops.rms_norm(x, torch.ones(4), 1e-6)
    assert out.dtype == torch.float16
    same(out, np.ones((1, 1, 4)), 1e-3)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Each pair (i, i + r / 2) turned as one complex number."""
    half = angles.shape[1]
    pairs = x[..., :half] + 1j * x[..., half : 2 * half]
    turned = pairs * np.exp(1j * angles)[None, :, None, :]
    return np.concatenate((turned.real, turned.imag, x[..., 2 * half :]), -1)


@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 4), st.sampled_from([2, 6, 8]))
@settings(max_examples=25, deadline=None)
def test_rope_turns_pairs_by_their_position(t, position, heads, rotated):
    x = random(2, t, heads, 8)
    angles = np.arange(12)[:, None] * 10000.0 ** (-np.arange(0, rotated, 2) / rotated)
    cos, sin = (torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin))
    found = ops.rope(x, cos, sin, torch.tensor([position]))
    same(found, rotate(x.double().numpy(), angles[position : position + t]))


def test_rope_past_its_tables_is_refused():
    table = torch.ones(4, 4)
    with pytest.raises(ValueError, match="position 6 lies past the tables' 4 rows"):
        ops.rope(random(1, 3, 1, 8), table, table, torch.tensor([3]))


def attend(q, k, v, window: int, scale: float, softcap: float = 0.0) -> np.ndarray:
    """Attention of the last ``len(q)`` of ``len(k)`` tokens, one query and one head at a time."""
    t, heads, width = q.shape
    total, kv_heads, _ = k.shape
    out = np.zeros((t, heads, width))
    for i in range(t):
        at = total - t + i
        first = max(0, at - window + 1) if window else 0
        for head in range(heads):
            kv = head // (heads // kv_heads)
            scores = k[first : at + 1, kv] @ q[i, head] * scale
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ v[first : at + 1, kv]
    return out.reshape(t, heads * width)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 3), (5, 5)]),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=40, deadline=None)
def test_attention_over_a_growing_cache(steps, heads, window, softcap):
    (num_heads, kv_heads), total, width = heads, sum(steps), 4
    q, k, v = random(total, num_heads, width), *random(2, total, kv_heads, width, seed=1)
    expected = attend(*(x.double().numpy() for x in (q, k, v)), window, 0.7, softcap)
    # A cache longer than the text, full of what must never be seen.
    k_cache, v_cache = (torch.full((1, kv_heads, total + 2, width), torch.nan) for _ in range(2))
    at = 0
    for count in steps:
        part = slice(at, at + count)
        new = [x[None, part] for x in (q, k, v)]
        place = torch.tensor([at])
        found = state_ops.attention(*new, k_cache, v_cache, place, window, 0.7, softcap)
        same(found[0], expected[part])
        at += count
    assert torch.equal(k_cache[0, :, :total], k.transpose(0, 1))
    assert torch.equal(v_cache[0, :, :total], v.transpose(0, 1))
    assert k_cache[0, :, total:].isnan().all() and v_cache[0, :, total:].isnan().all()


def test_attention_past_its_cache_is_refused_and_writes_nothing():
    cache = torch.zeros(1, 1, 4, 2)
    x = random(1, 3, 1, 2)
    with pytest.raises(ValueError, match="position 5 lies past the context of 4 tokens"):
        state_ops.attention(x, x, x, cache, cache.clone(), torch.tensor([2]), 0, 1.0, 0.0)
    assert not cache.any()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from([2, 3, 4]))
@settings(max_examples=25, deadline=None)
def test_a_short_convolution_in_pieces_is_one_over_all(steps, width):
    total = sum(steps)
    x, weight = random(1, total, 5), random(5, width, seed=1)
    padded = np.concatenate((np.zeros((width - 1, 5)), x[0].double().numpy()))
    expected = np.stack(
        [
            np.sum(padded[at : at + width] * weight.double().numpy().T, 0)  # the last is its own
            for at in range(total)
        ]
    )
    recent = torch.full((1, 5, width - 1), torch.nan)  # which the call at position 0 ignores
    at = 0
    for count in steps:
        part = slice(at, at + count)
        found = state_ops.short_conv(x[:, part], weight, recent, torch.tensor([at]))
        same(found[0], expected[part])
        at += count
    same(recent[0], padded[total:].T)


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, False)])
def test_layer_norm_subtracts_the_mean(parts):
    x = 3 * random(2, 3, 16) + 1
    weight, bias = (random(16, seed=i + 1) if there else None for i, there in enumerate(parts))
    wide = x.double().numpy()
    centred = wide - wide.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
    expected = expected * (1 if weight is None else weight.numpy())
    expected = expected + (0 if bias is None else bias.numpy())
    same(token_ops.layer_norm(x, weight, bias, 0.1), expected)


def test_gelu_has_two_forms():
    x = 3 * random(2, 3, 16)
    wide = x.double().numpy()
    tanh = np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))
    same(token_ops.gelu(x, "tanh"), 0.5 * wide * (1 + tanh))
    erf = np.vectorize(math.erf)(wide / np.sqrt(2))
    same(token_ops.gelu(x, "none"), 0.5 * wide * (1 + erf))
    assert not torch.allclose(token_ops.gelu(x, "tanh"), token_ops.gelu(x, "none"), atol=1e-5)


def test_what_changes_each_number():
    x, weight = 3 * random(2, 3, 16), random(16, seed=1)
    wide = x.double().numpy()
    same(token_ops.bias(x, weight), wide + weight.numpy())
    same(token_ops.scale(x, 0.22), wide * 0.22)
    same(token_ops.softcap(x, 2.0), 2 * np.tanh(wide / 2))
    same(token_ops.clamp(x, 1.5), wide.clip(-1.5, 1.5))


@pytest.mark.parametrize("format", FORMATS)
def test_quant_linear_multiplies_by_what_is_stored(format):
    made = RTN.quantize_rows(random(6, 96), parse_format(format))
    x = random(2, 3, 96, seed=1)
    found = ops.quant_linear(x, made.codes, made.scale, made.zero_point, format)
    same(found, x.double().numpy() @ decode(made, format, 96).T, 1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_quant_embedding_takes_rows_of_what_is_stored(format):
    made = RTN.quantize_rows(random(9, 96), parse_format(format))
    tokens = torch.tensor([[8, 0, 8], [2, 2, 1]])
    found = ops.quant_embedding(tokens, made.codes, made.scale, made.zero_point, format)
    same(found, decode(made, format, 96)[tokens.numpy()], 1e-7)
    assert found.dtype == torch.float32


def palette(bits: int, rows: int, columns: int, group: int):
    """Packed codes, tables, and float64 ``[rows, columns]`` of what they mean."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8)
    lut = np.sort(rng.standard_normal((rows // group, 2**bits)), axis=1).astype(np.float16)
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    packed = np.packbits(stream.reshape(rows, -1), axis=-1, bitorder="little")
    meant = lut[np.arange(rows)[:, None] // group, codes].astype(np.float64)
    return torch.from_numpy(packed), torch.from_numpy(lut), meant


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_palettes_are_looked_up(bits):
    codes, lut, meant = palette(bits, 12, 48, 4)
    x, tokens = random(2, 3, 48, seed=1), torch.tensor([[11, 0, 11], [4, 4, 1]])
    found = ops.quant_linear(x, codes, lut, None, f"lut{bits}-gc4")
    same(found, x.double().numpy() @ meant.T, 1e-4)
    rows = ops.quant_embedding(tokens, codes, lut, None, f"lut{bits}-gc4")
    assert rows.dtype == torch.float32
    assert np.array_equal(rows.numpy(), meant[tokens.numpy()])


def test_a_palettes_fake_kernels_are_true():
    codes, lut, _ = palette(3, 12, 48, 4)
    stored = (codes, lut, None, "lut3-gc4")
    for op, first in (
        (ops.quant_linear, random(1, 3, 48)),
        (ops.quant_embedding, torch.ones(1, 2)),
    ):
        given = first if op is ops.quant_linear else first.long()
        torch.library.opcheck(op, (given, *stored), test_utils=("test_schema", "test_faketensor"))


def test_a_float_format_is_no_quantized_format():
    made = RTN.quantize_rows(random(4, 32), parse_format("int8-pc"))
    with pytest.raises(ValueError, match="fp16 is a float format"):
        ops.quant_linear(random(1, 32), made.codes, made.scale, None, "fp16")


def samples() -> dict[str, tuple[object, ...]]:
    """Arguments for every operator in the namespace."""
    made = {f: RTN.quantize_rows(random(9, 64), parse_format(f)) for f in ("int4-g32-asym",)}
    asym = made["int4-g32-asym"]
    stored = (asym.codes, asym.scale, asym.zero_point, "int4-g32-asym")
    eight = RTN.quantize_rows(random(9, 64), parse_format("int8-pc"))
    tokens, position = torch.tensor([[3, 0, 8]]), torch.tensor([2])
    table = random(8, 2)
    q, kv, cache = random(1, 3, 4, 6), random(1, 3, 2, 6), torch.zeros(1, 2, 8, 6)
    memory = torch.zeros(1, 8, 6, 5)
    return {
        "embedding": (tokens, random(9, 5)),
        "linear": (random(1, 3, 7), random(5, 7)),
        "rms_norm": (random(1, 3, 7), random(7), 1e-6),
        "rope": (q, table, table, position),
        "attention": (q, kv, kv, cache, cache.clone(), position, 2, 0.5, 3.0),
        "short_conv": (random(1, 3, 5), random(5, 3), random(1, 5, 2), position),
        "bias": (random(1, 3, 7), random(7)),
        "layer_norm": (random(1, 3, 7), random(7), None, 1e-6),
        "gelu": (random(1, 3, 7), "tanh"),
        "scale": (random(1, 3, 7), 0.5),
        "softcap": (random(1, 3, 7), 2.0),
        "clamp": (random(1, 3, 7), 0.5),
        "gain": (random(1, 3, 4, 7), random(4, 1)),
        "l2_norm": (random(1, 3, 7), 1e-6),
        "token_shift": (random(1, 3, 5), random(1, 5, 1), position),
        "recurrence": (
            q,
            q,
            random(1, 3, 8, 5),
            -random(1, 3, 8).exp(),
            None,
            None,
            memory,
            position,
        ),
        "quant_linear": (random(1, 3, 64), *stored),
        "quant_embedding": (tokens, eight.codes, eight.scale, None, "int8-pc"),
        "round_per_token": (random(1, 3, 7),),
        "round_per_tensor": (random(1, 3, 7), torch.tensor([[0.0625]], dtype=torch.bfloat16)),
        "route": (random(1, 3, 4), 2, True),
        "route_sparse_mixer": (random(1, 3, 4), 0.1),
        # Every token has chosen every expert: shapes state the number of all tokens.
        "chosen_tokens": (random(1, 3, 7), torch.ones(1, 3, 2), 1),
        "combine": (torch.ones(1, 3, 2), [random(1, 3, 7), random(1, 3, 7, seed=1)]),
        "slots": (torch.ones(1, 3, 2), [random(1, 3, 8), random(1, 3, 8, seed=1)], 2, 4),
        "chosen_slots": (random(1, 3, 16), torch.ones(1, 3, 2), 1, 2, 4),
        "expert_queries": (random(1, 3, 7), torch.ones(1, 3, 2), random(2, 8, 7), 2, 4),
        "expert_outputs": (random(1, 3, 16), torch.ones(1, 3, 2), random(2, 7, 8), 2, 4),
        "experts": (
            random(1, 3, 7),
            torch.ones(1, 3, 2),
            random(2, 10, 7),
            random(2, 7, 5),
            "silu",
        ),
    }


def test_every_operator_has_samples():
    defined = {
        name.removeprefix("edgeforge::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("edgeforge::")
    }
    assert defined == set(samples())


@pytest.mark.parametrize("name", samples())
def test_schemas_and_fake_kernels_are_true(name):
    op = getattr(torch.ops.edgeforge, name).default
    torch.library.opcheck(op, samples()[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", samples())
def test_meta_results_have_the_shape_and_dtype_of_real_ones(name):
    op = getattr(torch.ops.edgeforge, name).default
    arguments = samples()[name]
    real = op(*arguments)
    meta = op(*tree_map_only(torch.Tensor, lambda each: each.to("meta"), arguments))
    assert meta.device.type == "meta"
    assert (meta.shape, meta.dtype) == (real.shape, real.dtype)
