"""Divergences along a block: means by position, over blocks of unequal length."""

from __future__ import annotations

import pytest
import torch

from edgeforge.verification.curve import BUCKETS, CurveMeter


def test_a_step_at_a_position_is_seen_there_and_short_blocks_count_where_they_reach():
    meter = CurveMeter(96)
    long = torch.where(torch.arange(96) < 48, 0.0, 3.0)
    meter.add({"lowering": long, "total": long + 1})
    meter.add({"lowering": torch.ones(4), "total": torch.zeros(4)})
    curve = meter.result()
    assert len(curve.first) == BUCKETS and curve.first[:3] == (0, 3, 6)
    assert curve.counts[:3] == (6, 4, 3) and sum(curve.counts) == 100
    assert curve.lowering[15:17] == (0.0, 3.0) and curve.total[16] == 4.0
    assert curve.lowering[0] == pytest.approx(0.5) and curve.lowering[1] == pytest.approx(0.25)


def test_a_block_shorter_than_the_buckets_has_one_for_each_position():
    meter = CurveMeter(5)
    meter.add({"lowering": torch.arange(5.0), "total": torch.zeros(5)})
    assert meter.result().lowering == (0.0, 1.0, 2.0, 3.0, 4.0)
