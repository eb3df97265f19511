"""What every test shares: PyTorch's share of the cores, traces, and the mark `artifact`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest


def _on_threads(count: int) -> Iterator[None]:
    """PyTorch on some threads while a fixture lasts; afterwards as before."""
    import torch

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
    yield from _on_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: models of a few thousand weights run fastest so."""
    yield from _on_threads(1)


@pytest.fixture
def four_threads() -> Iterator[None]:
    """PyTorch on four threads, however many cores there are."""
    yield from _on_threads(4)


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """What the pipeline traces is traced once a run for each model and context.

    Tracing takes four fifths of the time of a small model's export and knows nothing of targets and
    formats. Nothing may change a program that it was given, which is checked whenever one is given
    again. `test_trace` traces anew.
    """
    from edgeforge.model import trace as module

    trace, lock = module.trace, threading.Lock()
    made: dict[str, tuple[object, str]] = {}

    def words(program) -> str:
        nodes = "\n".join(str(node.format_node()) for node in program.graph.nodes)
        return f"{nodes}\n{program.inputs}"

    def kept(spec, context):
        key = f"{spec!r} {context}"
        with lock:
            if key not in made:
                program = trace(spec, context)
                made[key] = program, words(program)
            program, before = made[key]
        assert words(program) == before, "a stage has changed the program that it was given"
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", kept)
        yield
