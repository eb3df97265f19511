"""Runs independent pieces of work, such as chunks of rows, in threads."""

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
    """Makes torch's operators run in the calling thread while the block runs.

    Several threads call operators at once here, and torch's own threads would wait for each other
    in every operator.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_pool(count: int, name: str) -> ThreadPoolExecutor:
    """Returns threads that compute on as many of torch's threads as the caller does.

    OpenMP and MKL keep that number apart for each thread of a process, and torch hands it to a new
    one not before the thread asks for it. A product of matrices does not ask: it would take every
    processor, and its threads would wait for those of the others.

    Args:
        count: the number of threads.
        name: the beginning of their names.
    """
    return ThreadPoolExecutor(count, thread_name_prefix=name, initializer=torch.get_num_threads)


def run_all(
    work: Callable[[Item], Result], items: Sequence[Item], threads: int | None = None
) -> list[Result]:
    """Calls ``work`` on each item, in threads that never wait for each other.

    The first error is raised again, and items that no thread has begun are then skipped.

    Args:
        work: called once per item.
        items: any number of items.
        threads: number of threads; by default one per processor, four at most.

    Returns:
        The results in the items' order.
    """
    count = threads or default_threads()
    with single_threaded_torch(), torch_pool(count, "rows") as pool:
        pending = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in pending]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
