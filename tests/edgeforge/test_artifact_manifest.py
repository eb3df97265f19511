"""What a manifest says of the tools that made an artifact."""

import importlib.metadata
import sys

from edgeforge import artifact_manifest
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest
from exporters.registry import find_target


def test_exporting_needs_no_runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    real = importlib.metadata.version

    def version(name):
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(artifact_manifest, "version", version)
    # Python refuses to import what has None for a module, as it refuses what is not installed.
    for runtime in ("onnxruntime", "executorch", "coremltools", "torchao"):
        monkeypatch.setitem(sys.modules, runtime, None)
    model = open_model(str(synthesise("tiny-llama", tmp_path / "checkpoint")))
    targets = [find_target(name) for name in ("onnx", "coreml", "executorch")]
    for folder in export(model, targets, tmp_path / "out", ExportOptions("int4", context=48)):
        assert Manifest.read(folder).tools == {
            name: real(name) for name in ("edgeforge", "torch", "onnx")
        }
