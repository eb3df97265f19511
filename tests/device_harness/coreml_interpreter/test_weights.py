"""Weights hold their scales once, in the form in which they are used."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from device_harness.coreml_interpreter.weights import BlockWeight, Budget
from exporters.coreml.constants import Constant
from quant.kernels import blocks


@pytest.mark.skipif(not blocks.available(), reason="the kernels were not built")
@pytest.mark.parametrize("block_rows", [1, 2])
def test_kernels_are_given_the_only_copy_of_the_scales(block_rows):
    """Those of a package of 4-bit weights take as much as a quarter of its codes, or more."""
    rows, columns = 6, 16
    data = Constant("int8", (rows, columns), np.arange(96, dtype=np.int8).reshape(rows, columns))
    scale = torch.arange(1.0, 1 + 2 * rows // block_rows).reshape(rows // block_rows, 2)
    spread = scale.repeat_interleave(block_rows, 0).repeat_interleave(8, 1)
    weight = BlockWeight(data, scale, None, False, Budget(0))
    assert weight.blocks is not None
    assert torch.equal(weight.make(1, 5), torch.from_numpy(data.data[1:5]).float() * spread[1:5])
    if block_rows == 1:
        assert weight.blocks.scale.data_ptr() == scale.data_ptr()
    else:  # the kernels need one row of scales for each row of codes
        given = weakref.ref(scale)
        del scale
        assert given() is None
