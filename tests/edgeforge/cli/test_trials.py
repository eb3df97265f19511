"""What `edgeforge doctor` tries, where packages are broken, missing, or end the process."""

from __future__ import annotations

import pytest

from edgeforge.cli.trials import try_all

pytestmark = pytest.mark.artifact


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Puts modules of a given source in the way of the real ones, in new processes."""

    def put(**sources: str) -> None:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return put


def test_a_package_that_exporting_needs_is_broken(modules):
    modules(onnx="raise ImportError('the file libonnx.so is damaged')")
    kernels, targets = try_all(("onnx", "coreml"))
    assert kernels["built"] is not None and kernels["error"] is None
    assert targets["onnx"] == {
        "export_error": "ImportError: the file libonnx.so is damaged",
        "runtime": None,
        "run_error": "there is no artifact to run",
    }
    # The other target's artifact does not suffer from it.
    assert targets["coreml"]["export_error"] is None
    assert targets["coreml"]["run_error"] is None


def test_torch_is_broken(modules):
    modules(torch="import os; os.abort()")
    kernels, targets = try_all(("onnx",))
    assert kernels["built"] is None and kernels["error"] == "its process ended by SIGABRT"
    assert targets["onnx"]["export_error"] == "its process ended by SIGABRT"


NO_EXECUTORCH = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == "executorch":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
"""


def test_runtimes_that_crash_or_are_missing(modules, tmp_path, monkeypatch):
    modules(
        onnxruntime="import os, sys; print('bad cpu', file=sys.stderr); os.abort()",
        sitecustomize=NO_EXECUTORCH,
    )
    # What lies in the current folder hides no package, an output folder of this name for one.
    (tmp_path / "here" / "onnx").mkdir(parents=True)
    (tmp_path / "here" / "onnx" / "__init__.py").write_text("raise ImportError('no package')")
    (tmp_path / "here" / "torch.py").write_text("raise ImportError('a file of the user')")
    monkeypatch.chdir(tmp_path / "here")
    _, targets = try_all(("onnx", "executorch"))
    assert targets == {
        "onnx": {
            "export_error": None,
            "runtime": None,
            "run_error": "its process ended by SIGABRT: bad cpu",
        },
        "executorch": {
            "export_error": None,
            "runtime": None,
            "run_error": "ExecuTorch is not installed, and this artifact runs in it: pip install "
            '"edgeforge[executorch]"',
        },
    }


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    place, cache = tmp_path / "temporary", tmp_path / "cache"
    place.mkdir()
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("EDGEFORGE_CACHE", str(cache))
    try_all(())
    assert not list(place.iterdir()) and not cache.exists()
