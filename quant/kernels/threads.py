"""Threads for work that goes row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from quant.processors import default_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Torch's operators run in the calling thread: their own threads wait in every operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int | None = None
) -> list[Result]:
    """Some work on each item, in threads that never wait for each other.

    Args:
        work: called once an item.
        items: any number.
        threads: how many; by default one per processor, four at most.

    Returns:
        The results in the items' order; the first error is raised, and what has not begun is left.
    """
    count = threads or default_threads()
    with single_threaded_torch(), ThreadPoolExecutor(count, thread_name_prefix="rows") as pool:
        pending = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in pending]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
