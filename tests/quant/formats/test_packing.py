"""Packed codes against plain Python, and the meaning of the stored parts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.formats.formats import IntFormat, PaletteFormat
from quant.formats.packing import (
    dequantize,
    look_up,
    pack_bits,
    pack_codes,
    pack_int4,
    pack_int4_numpy,
    unpack_bits,
    unpack_codes,
    unpack_int4,
    unpack_int4_numpy,
)

CODES = st.lists(st.integers(0, 15), min_size=1, max_size=70)


@given(CODES)
def test_low_nibble_is_the_even_column(codes):
    packed = pack_int4(torch.tensor(codes, dtype=torch.uint8)).tolist()
    expected = []
    for index in range(0, len(codes), 2):
        odd = codes[index + 1] if index + 1 < len(codes) else 0
        expected.append(codes[index] + 16 * odd)
    assert packed == expected
    assert pack_int4_numpy(np.array(codes, dtype=np.uint8)).tolist() == expected


@given(CODES, st.integers(1, 3))
def test_unpacking_undoes_packing(codes, rows):
    matrix = torch.tensor([codes] * rows, dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(matrix), len(codes)), matrix)
    array = matrix.numpy()
    assert np.array_equal(unpack_int4_numpy(pack_int4_numpy(array), len(codes)), array)


def test_packing_leaves_its_input_alone():
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    pack_int4(codes)
    assert codes.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_is_code_minus_zero_point_times_scale(bits, symmetric):
    rng = np.random.default_rng(bits)
    rows, groups, size = 3, 5, 8
    fmt = IntFormat(bits, size, symmetric)
    codes = rng.integers(0, 2**bits, (rows, groups, size))
    points = rng.integers(0, 2**bits, (rows, groups))
    if symmetric:
        points[:] = 2 ** (bits - 1)
    scale = torch.tensor(rng.uniform(0.01, 2.0, (rows, groups))).to(torch.bfloat16)
    wide = scale.double().numpy()
    expected = ((codes - points[..., None]) * wide[..., None]).reshape(rows, -1)

    flat = packed_by_numpy(codes.reshape(rows, -1), bits)
    zero = packed_by_numpy(points, bits)
    values = dequantize(flat, scale, None if symmetric else zero, fmt)
    assert values.dtype == torch.float32
    assert np.array_equal(values.double().numpy(), expected)


def packed_by_numpy(codes, bits):
    """NumPy's own bits, of each code and of each byte; the last byte is filled up with zeros."""
    stream = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")
    flat = stream[..., :bits].reshape(*codes.shape[:-1], -1)
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little"))


@given(st.integers(2, 8), st.integers(1, 3), st.integers(1, 40), st.data())
def test_codes_of_every_width_and_number_are_packed_and_unpacked(bits, rows, count, data):
    size = rows * count
    drawn = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size))
    codes = np.array(drawn, np.uint8).reshape(rows, count)
    fmt = IntFormat(bits, None)
    packed = pack_codes(torch.from_numpy(codes), fmt)
    assert packed.is_contiguous() and torch.equal(packed, packed_by_numpy(codes, bits))
    assert np.array_equal(unpack_codes(packed, fmt, count).numpy(), codes)


@given(st.sampled_from([2, 3, 4, 6, 8]), st.integers(1, 3), st.integers(1, 9), st.data())
def test_codes_are_a_stream_of_bits_the_lowest_first(bits, rows, words, data):
    codes = data.draw(
        st.lists(st.integers(0, 2**bits - 1), min_size=rows * words * 8, max_size=rows * words * 8)
    )
    matrix = np.array(codes, np.uint8).reshape(rows, -1)
    # NumPy's own bits, of each code and of each byte.
    stream = np.unpackbits(matrix[..., None], axis=-1, bitorder="little")[..., :bits]
    expected = np.packbits(stream.reshape(rows, -1), axis=-1, bitorder="little")
    packed = pack_bits(torch.from_numpy(matrix), bits)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(unpack_bits(packed, bits).numpy(), matrix)


def test_four_bits_of_a_palette_lie_as_int4_does():
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 9, 7]], dtype=torch.uint8)
    assert torch.equal(pack_bits(codes, 4), pack_int4(codes))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("rows_per_group", [None, 2, 3])
def test_looking_up_takes_the_entry_of_the_rows_table(bits, rows_per_group):
    rng = np.random.default_rng(bits)
    rows, cols, fmt = 6, 16, PaletteFormat(bits, rows_per_group)
    codes = rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8)
    lut = np.sort(rng.standard_normal((fmt.groups(rows), 2**bits)).astype(np.float16), axis=1)
    expected = [
        [lut[row // (rows_per_group or rows), code] for code in codes[row]] for row in range(rows)
    ]
    packed, table = pack_bits(torch.from_numpy(codes), bits), torch.from_numpy(lut)
    values = look_up(packed, table, fmt)
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy(), np.array(expected, np.float32))
    some = torch.tensor([5, 0, 3])
    assert torch.equal(look_up(packed[some], table, fmt, some), values[some])
