"""Wheels by pip, from a folder in place of an index."""

from __future__ import annotations

import zipfile

import pytest

from device_harness.devices.arm64 import fetching
from device_harness.devices.arm64.download import NotReachableError, digest_of
from device_harness.devices.arm64.fetching import bring_wheels
from device_harness.devices.arm64.pins import Wheel
from device_harness.devices.arm64.wheels import find_wheel, unpack_wheel
from device_harness.devices.progress import no_progress
from device_harness.errors import SetupError


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (
        ("NO_INDEX", "1"),
        ("FIND_LINKS", str(folder)),
        ("CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def wheel(index):
    file = index / "small_thing-1.0-cp311-cp311-manylinux_2_28_aarch64.whl"
    about = "small_thing-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("small_thing/__init__.py", "x = 1\n")
        archive.writestr("small_thing/tests/x.py", "")
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: small_thing\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_28_aarch64\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return file


def test_a_wheel_of_another_processor_is_found_and_brought(wheel, place, tmp_path):
    assert find_wheel("small_thing", "1.0").address == wheel.as_uri()
    pinned = Wheel("small_thing", "1.0", digest_of(wheel), wheel.stat().st_size, "site")
    (brought,) = bring_wheels([pinned], no_progress)
    names = unpack_wheel(brought, tmp_path / "site", lambda name: "/tests/" not in name)
    assert "small_thing/__init__.py" in names and "small_thing/tests/x.py" not in names
    assert (tmp_path / "site/small_thing/__init__.py").read_text() == "x = 1\n"


def test_a_wheel_of_another_digest_is_refused(wheel, place):
    pinned = Wheel("small_thing", "1.0", "0" * 64, wheel.stat().st_size, "site")
    with pytest.raises(SetupError, match="not the pinned sha256"):
        bring_wheels([pinned], no_progress)


def test_where_the_address_alone_does_not_do_pip_downloads(wheel, place, monkeypatch):
    real = fetching.fetch

    def refused(address, *rest):
        if address == wheel.as_uri():
            raise NotReachableError("it answers 401")
        return real(address, *rest)

    monkeypatch.setattr(fetching, "fetch", refused)
    pinned = Wheel("small_thing", "1.0", digest_of(wheel), wheel.stat().st_size, "site")
    (brought,) = bring_wheels([pinned], no_progress)
    assert digest_of(brought) == pinned.sha256
    assert [path.name for path in brought.parent.iterdir()] == [brought.name]


def test_no_wheel_is_one_sentence(index):
    with pytest.raises(SetupError) as caught:
        find_wheel("small_thing", "2.0")
    assert str(caught.value).startswith(
        "pip finds no aarch64 wheel of small_thing 2.0 for Python 3.11:"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"x" * 100])
def test_a_damaged_wheel_is_one_sentence(tmp_path, content):
    (tmp_path / "x.whl").write_bytes(content)
    with pytest.raises(SetupError, match=r"x\.whl is damaged"):
        unpack_wheel(tmp_path / "x.whl", tmp_path / "site")
