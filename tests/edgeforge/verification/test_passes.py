"""An app's calls: prompts in chunks, chunk edges, single tokens, to the last position."""

from __future__ import annotations

import pytest

from edgeforge.verification.passes import plan_passes, positions_of

ANY_UP_TO_128 = tuple(range(1, 129))


@pytest.mark.parametrize("reach", [1, 2, 3, 5, 48, 64, 100, 300, 1024, 4096])
@pytest.mark.parametrize("chunks", [(), (64,), (16, 64, 256), (5,), ANY_UP_TO_128])
def test_the_first_pass_reaches_the_last_position_and_none_goes_beyond(reach, chunks):
    passes = plan_passes(reach, chunks)
    assert sum(passes[0]) == reach
    assert all(0 < sum(calls) <= reach and min(calls) > 0 for calls in passes)


@pytest.mark.parametrize("chunks", [(), (64,), (16, 64, 256), ANY_UP_TO_128])
def test_prompts_and_single_tokens_are_spread_over_the_whole_text(chunks):
    calls = plan_passes(4096, chunks)[0]
    ends = positions_of(calls)
    prompts = [end for end, size in zip(ends, calls, strict=True) if size > 1]
    singles = [end for end, size in zip(ends, calls, strict=True) if size == 1]
    assert ends[-1] == singles[-1] == 4095
    for found, gap in ((prompts, 80), (singles, 600)):
        assert max(b - a for a, b in zip([0, *found], [*found, 4095], strict=True)) <= gap
    # It costs no more than a chunk and some single tokens.
    assert len(singles) < 200


@pytest.mark.parametrize(("chunks", "size"), [((64,), 64), ((16, 64, 256), 256), ((16, 64), 16)])
def test_edges_of_every_chunk_are_looked_at(chunks, size):
    passes = plan_passes(1024, chunks)
    assert [size + 1, 1, 1] in passes and [2 * size + 2, 1, 1] in passes


def test_a_context_of_one_chunk_is_also_run_token_by_token():
    assert plan_passes(64, (64,)) == [[64], [1, 1, 1], [1] * 64]
