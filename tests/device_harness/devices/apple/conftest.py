"""A Mac with an iPhone that are both fake, and a package to run there; see FAKE.md."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_harness.devices.apple.phone_session import PhoneSession
from device_harness.devices.apple.phone_worker import open_on_phone
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.options import TargetOptions
from exporters.registry import find_target

HERE = Path(__file__).parent
MODULE = "device_harness.devices.apple"
UDID = "00008130-FA4E000000000001"


def become_a_mac(patch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Makes this machine pass for a Mac with one fake phone; returns the phone's storage."""
    phone, tools = folder / "phone", folder / "tools"
    phone.mkdir()
    tools.mkdir()
    for name in ("xcrun", "devicectl", "xcodebuild"):
        script = tools / name
        script.write_text(
            f"#!{sys.executable} -SE\nimport sys\nsys.path.insert(0, {str(HERE)!r})\n"
            f"from fake_devicectl import main\nmain(sys.argv[1:])\n"
        )
        script.chmod(0o755)
    patch.setenv("PATH", str(tools), prepend=":")
    patch.setenv("FAKE_PHONE", str(phone))
    patch.setattr(f"{MODULE}.devicectl.on_a_mac", lambda: True)
    patch.setattr(f"{MODULE}.mac.on_a_mac", lambda: True)
    return phone


def have_xcode(patch: pytest.MonkeyPatch) -> None:
    """Makes nothing of what Apple's compiler and Xcode would build."""
    from coremltools.models.ml_program.experimental import remote_device

    def compiled(package: Path, folder: Path) -> Path:
        return Path(shutil.copytree(package, folder / "model.mlmodelc"))

    def built(device: object, build_directory: Path, credentials: object) -> Path:
        app = build_directory / "fake.app"
        app.mkdir(parents=True)
        return app

    patch.setattr(f"{MODULE}.remote.compile_package", compiled)
    patch.setattr(f"{MODULE}.remote.POLL_SECONDS", 0.02)
    patch.setattr(remote_device._ModelRunnerAppBuilder, "build", staticmethod(built))


@pytest.fixture
def fake_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fake Mac for one test; its phone's storage."""
    return become_a_mac(monkeypatch, tmp_path)


@pytest.fixture
def fake_xcode(fake_mac: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with Xcode."""
    have_xcode(monkeypatch)
    return fake_mac


@pytest.fixture(scope="module", params=["ios18", "ios17"])
def phone(
    request: pytest.FixtureRequest,
    artifacts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, PhoneSession]]:
    """An artifact on a fake phone: the generation of operators, and its session."""
    with pytest.MonkeyPatch.context() as patch:
        become_a_mac(patch, tmp_path_factory.mktemp("mac"))
        have_xcode(patch)
        with open_on_phone(artifacts[request.param], UDID, {}) as session:
            yield request.param, session


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A tiny Llama for iOS 18, with states, and for iOS 17, without."""
    root = tmp_path_factory.mktemp("apple")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        model, made = open_model(str(synthesise("tiny-llama", root / "checkpoint"))), {}
        for opset in ("ios18", "ios17"):
            target = TargetOptions(chunk="4", opset=opset)
            options = ExportOptions("int8", context=32, target=target)
            (made[opset],) = export(model, [find_target("coreml")], root / opset, options)
        yield made
