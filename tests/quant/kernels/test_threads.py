"""Threads that compute: each takes torch's number of threads, also in products of matrices."""

import ctypes

import pytest
import torch

from quant.kernels.threads import run_all, single_threaded_torch, torch_pool


@pytest.fixture
def openmp_threads():
    """Tells how many threads OpenMP gives the next parallel region of the calling thread."""
    try:
        return ctypes.CDLL(None).omp_get_max_threads
    except AttributeError:
        pytest.skip("torch was built without OpenMP, or keeps it to itself")


@pytest.mark.parametrize("count", [1, 3])
def test_new_threads_compute_on_as_many_as_their_caller(openmp_threads, count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch_pool(2, "computing") as pool:
            found = set(pool.map(lambda _: openmp_threads(), range(20)))
    finally:
        torch.set_num_threads(before)
    assert found == {count}


def test_pieces_of_work_compute_on_one_each(openmp_threads):
    assert set(run_all(lambda _: openmp_threads(), range(20), threads=2)) == {1}
    with single_threaded_torch():
        assert openmp_threads() == 1


def test_the_first_error_is_raised_and_the_rest_is_skipped():
    begun = []

    def work(item):
        begun.append(item)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        run_all(work, range(1000), threads=1)
    assert len(begun) < 1000
