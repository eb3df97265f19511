"""Two small artifacts, and kinds of devices that go wrong at their outermost edge."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from device_harness.devices import registry
from device_harness.devices.host import HostDevice
from device_harness.errors import DeviceError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.registry import find_target


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> SimpleNamespace:
    """``int4`` and ``int8`` of one model, and ``other``, of a model with other weights."""
    root = tmp_path_factory.mktemp("measurements")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        for name, recipe, seed in (("int4", "int4", 0), ("int8", "int8", 0), ("other", "int4", 7)):
            model = open_model(
                str(synthesise("tiny-llama", root / f"model {seed}", seed=seed, force=True))
            )
            options = ExportOptions(recipe, context=64)
            found[name] = export(model, [find_target("onnx")], root / name, options)[0]
    return SimpleNamespace(root=root, **found)


class Gone(HostDevice):
    """A device that was unplugged."""

    def __init__(self, place: str = "") -> None:
        raise DeviceError(f"gone:{place} is not connected: plug it in")


@pytest.fixture
def devices(artifacts, monkeypatch) -> None:
    """``gone``, and ``swapped``, which runs another model than it was given: real garbage."""

    class Swapped(HostDevice):
        name = "swapped"

        def start(self, folder: Path, manifest, arguments):
            return super().start(artifacts.other, manifest, arguments)

    for name, kind in (("gone", Gone), ("swapped", Swapped)):
        row = registry.Kind(kind, list, ("onnx",))
        monkeypatch.setitem(registry.KINDS, name, row)
