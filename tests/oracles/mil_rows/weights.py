"""Arguments of operations that unpack or quantize."""

from __future__ import annotations

import math

import numpy as np

from tests.oracles.mil_rows.draw import Arguments, Draw


def make_blockwise(d: Draw) -> Arguments:
    """int8 and float data; four-bit data needs coremltools' own types and is in the packages."""
    blocks = (d.int(1, 3), d.int(1, 3))
    shape = tuple(count * d.int(1, 4) for count in blocks)
    data = d.ints(shape, -128, 128).astype(np.int8)
    scale = d.floats(blocks, 0.01, 0.1).astype(d.pick(np.float16, np.float32))
    given = {"data": data, "scale": scale}
    return {**given, "offset": d.ints(blocks, -9, 9).astype(np.int8)} if d.flag() else given


def make_affine(d: Draw) -> Arguments:
    shape = d.shape(2, 3)
    axis = d.int(0, len(shape) - 1)
    count: tuple[int, ...] = (shape[axis],) if d.flag() else ()
    return {
        "quantized_data": d.ints(shape, -128, 128).astype(np.int8),
        "zero_point": d.ints(count, -9, 9).astype(np.int8),
        "scale": d.floats(count, 0.01, 0.1),
        "axis": np.int32(axis),
    }


def make_lut_ios16(d: Draw) -> Arguments:
    shape = d.shape(1, 3)
    bits = d.pick(1, 2, 4, 6, 8)
    codes = d.codes(bits, (math.prod(shape),))
    spread_bits = (codes[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(spread_bits.reshape(-1).astype(np.uint8), bitorder="little")
    lut = d.floats((1 << bits,))
    return {"indices": packed, "lut": lut, "shape": np.array(shape, np.uint32)}


def make_sparse_ios16(d: Draw) -> Arguments:
    shape = d.shape(1, 3)
    mask = d.bools((math.prod(shape),))
    mask[0] = True
    values = d.floats((int(mask.sum()),))
    packed = np.packbits(mask, bitorder="little")
    return {"nonzero_data": values, "mask": packed, "shape": np.array(shape, np.uint32)}


def make_lut_to_sparse(d: Draw) -> Arguments:
    blocks = (d.int(1, 2), d.int(1, 2))
    shape = tuple(count * d.int(1, 3) for count in blocks)
    mask = d.bools(shape).astype(np.uint8)
    mask[0, 0] = 1
    width = d.pick(1, 2)
    given = {
        "indices_mask": mask,
        "indices_nonzero_data": d.codes(2, (int(mask.sum()),)),
        "lut": d.floats((*blocks, 4, width)),
    }
    return {**given, "vector_axis": np.int32(d.int(0, 1))} if width > 1 else given


def make_sparse_blockwise(d: Draw) -> Arguments:
    blocks = (d.int(1, 2), d.int(1, 2))
    shape = tuple(count * d.int(1, 3) for count in blocks)
    mask = d.bools(shape).astype(np.uint8)
    mask[0, 0] = 1
    return {
        "data_mask": mask,
        "nonzero_data": d.ints((int(mask.sum()),), -128, 128).astype(np.int8),
        "scale": d.floats(blocks, 0.01, 0.1),
        "offset": d.ints(blocks, -9, 9).astype(np.int8),
    }


def make_quantize(d: Draw) -> Arguments:
    x, kind = d.floats(d.shape()), d.pick(np.int8, np.uint8)
    axis = d.axis(x.ndim)
    shape: tuple[int, ...] = (x.shape[axis],) if d.flag() else ()
    points = np.asarray(d.ints(shape, 0, 9)).astype(kind)
    given = {
        "input": x,
        "scale": np.float32(d.floats(shape, 0.01, 0.1)),
        "zero_point": points if shape else kind(points),
        "output_dtype": np.dtype(kind).name,
    }
    return {**given, "axis": np.int32(axis)} if shape else given


def make_dequantize(d: Draw) -> Arguments:
    given = make_quantize(d)
    kind = given.pop("output_dtype")
    return {**given, "input": d.ints(given["input"].shape, 0, 100).astype(kind)}
