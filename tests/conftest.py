"""What every test shares: PyTorch's share of the cores, and the mark `artifact`.

`make check` runs what is not marked. Nobody has to remember the mark: it is applied here, by the
folder a test lies in or by a fixture it uses, and a test that lacks it may neither write an
artifact nor start a command line (see `no_unmarked_artifact`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def set_threads(count: int) -> Iterator[None]:
    """PyTorch on some threads while a fixture lasts; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def share_of_the_cores() -> Iterator[None]:
    """PyTorch takes this worker's share of the cores.

    Its threads wait for each other in every operator: two workers that took all cores each would
    wait for most of the run.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    yield from set_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: models of a few hundred weights run fastest so."""
    yield from set_threads(1)


@pytest.fixture
def four_threads() -> Iterator[None]:
    """PyTorch on four threads, however many cores there are."""
    yield from set_threads(4)
