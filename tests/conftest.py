"""What every test shares: the mark `artifact`, groups for workers, threads, and traces."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from device_harness.devices.arm64.place import arm64_folder
from device_harness.devices.arm64.root import Root
from device_harness.errors import SetupError

ROOT = Path(__file__).parent.parent
# This worker's share of the cores, for each of its processes. Threads wait for each other in every
# operator: two workers that took all cores each would wait for most of the run.
SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(SHARE)
# Fixtures that export a model, and the one that runs a command line.
# `arm64_root` sets an emulator up from the registries, or finds it set up.
WRITERS = frozenset(
    {
        *("artifact", "artifacts", "build", "captures", "edgeforge", "reported", "sound_artifact"),
        "arm64_root",
    }
)
# Files and folders whose tests start command lines, or run whole packages, by themselves.
RUNNERS = (
    "tests/examples/test_scripts.py",
    "tests/edgeforge/bad_input/",
    "tests/device_harness/coreml_interpreter/test_converted.py",
)
# Folders whose tests take long, which begin first: what is short fills the end evenly.
LONG = ("tests/exporters/", "tests/edgeforge/", "tests/device_harness/", "tests/")
# One worker takes the files of a group, for they share what is expensive to make or to import; any
# other file is a group of its own.
GROUPS = {
    "tests/exporters/onnx/test_float_artifacts.py": "coremltools and traces of every case",
    "tests/exporters/executorch/test_float_artifacts.py": "coremltools and traces of every case",
    "tests/exporters/coreml/": "coremltools and traces of every case",
    "tests/device_harness/coreml_interpreter/": "coremltools and traces of every case",
    "tests/exporters/onnx/test_families.py": "traces of every family",
    "tests/exporters/executorch/test_families.py": "traces of every family",
    "tests/exporters/executorch/test_stock_route.py": "ExecuTorch's exporter",
    "tests/exporters/executorch/test_backends.py": "ExecuTorch's exporter",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Applies the mark `artifact`, so that nobody has to remember it, and begins with what is long.

    `make check` runs what is not marked. Marked is every test of a file that imports what exports,
    and every test that uses a fixture that does; `pytest_runtest_protocol` refuses an artifact to
    all others.
    """
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        fixtures = set(getattr(item, "fixturenames", ()))
        if file.startswith(RUNNERS) or fixtures & WRITERS or _imports_export(item):
            item.add_marker("artifact")
    items.sort(key=lambda item: _place(item.path.relative_to(ROOT).as_posix()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object | None:
    """Gives a worker whole groups of `GROUPS`, or whole files, where groups are asked for.

    Fixtures of a file are made once then. The marks ``xdist_group`` would say the same, but what
    xdist 3.8 writes them into is not looked at by pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return next((GROUPS[path] for path in GROUPS if file.startswith(path)), file)

    return ByGroup(config, log) if config.getvalue("dist") == "loadgroup" else None


def _imports_export(item: pytest.Item) -> bool:
    pipeline = sys.modules.get("edgeforge.pipeline")
    exporting = (sys.modules.get("edgeforge.api"), pipeline, getattr(pipeline, "export", None))
    module = getattr(item, "module", None)
    imported = vars(module).values() if module is not None else ()
    return any(value is not None and any(value is e for e in exporting) for value in imported)


def _place(file: str) -> int:
    return next((at for at, folder in enumerate(LONG) if file.startswith(folder)), len(LONG))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Refuses to write an artifact for a test that lacks the mark."""

    def refused(*_: object) -> None:
        raise AssertionError("this test writes an artifact: see `artifact` in tests/conftest.py")

    with pytest.MonkeyPatch.context() as patch:
        pipeline = sys.modules.get("edgeforge.pipeline")
        if pipeline is not None and item.get_closest_marker("artifact") is None:
            patch.setattr(pipeline, "atomic_folder", refused)
        return (yield)


def _on_threads(count: int) -> Iterator[None]:
    """PyTorch on some threads while a fixture lasts; afterwards as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def share_of_the_cores() -> Iterator[None]:
    """PyTorch takes this worker's share of the cores."""
    yield from _on_threads(SHARE)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: models of a few thousand weights run fastest so."""
    yield from _on_threads(1)


@pytest.fixture
def four_threads() -> Iterator[None]:
    """PyTorch on four threads, however many cores there are."""
    yield from _on_threads(4)


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All workers of a run share a cache, which is not the user's: each store is made once.

    Processes may use one cache at the same time. A test that asks for an empty one has its own.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker's folder lies in the run's
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder / "cache of all workers"))
        yield


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


@pytest.fixture(scope="session", autouse=True)
def compared_once() -> Iterator[None]:
    """Two texts are searched for a shared passage once a run, which takes a second for those here.

    The search depends on nothing but its arguments.
    """
    from edgeforge.calibration import text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "shared_passage", functools.cache(text.shared_passage))
        yield


# Before any test or fixture points the cache elsewhere: what is set up here stays for the next run.
_ARM64 = str(arm64_folder())


@pytest.fixture(scope="session")
def arm64_root() -> Iterator[Root]:
    """The arm64 emulator's root folder, set up in the user's own cache when it is not there yet.

    A machine that does not allow it skips with the reason; in CI that is a failure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_ARM64", _ARM64)
        yield _set_up()


@pytest.fixture(scope="session")
def arm64_executorch(arm64_root: Root) -> Root:
    """The same with ExecuTorch's kernels for arm64."""
    return _set_up(executorch=True)


def _set_up(executorch: bool = False) -> Root:
    from device_harness.devices.arm64.setup import set_up

    try:
        return set_up(executorch=executorch)
    except SetupError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs the arm64 emulator, and it cannot be set up: {error}")
        pytest.skip(f"the arm64 emulator cannot be set up: {error}")
