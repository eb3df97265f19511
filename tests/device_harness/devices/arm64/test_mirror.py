"""Where packages come from, and what a release holds now."""

from __future__ import annotations

import lzma

import pytest

from device_harness.devices.arm64 import debian_index
from device_harness.devices.arm64.debian_index import read_index
from device_harness.devices.arm64.fetching import bring_packages
from device_harness.devices.arm64.mirror import find_mirror
from device_harness.devices.arm64.pins import Package, read_pins
from device_harness.devices.progress import no_progress
from device_harness.errors import SetupError


@pytest.fixture
def apt(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEFORGE_DEBIAN_MIRROR", raising=False)
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_the_mirror_is_that_of_the_machine(apt):
    (apt / "sources.list.d/other.list").write_text("deb https://x.example/apt other main\n")
    (apt / "sources.list.d/debian.sources").write_text(
        "Types: deb\nURIs: http://m.example/debian/\nSuites: bookworm bookworm-updates\n"
        "Components: main\n\nTypes: deb\nURIs: http://s.example/sec\nSuites: bookworm-security\n"
    )
    assert find_mirror(apt) == "http://m.example/debian"


def test_an_old_list_of_sources_is_read_too(apt):
    (apt / "sources.list").write_text(
        "# deb http://no.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/x] http://m.example/debian trixie main\n"
    )
    assert find_mirror(apt) == "http://m.example/debian"


def test_a_source_that_is_off_does_not_count(apt):
    (apt / "sources.list.d/a.sources").write_text(
        "Enabled: no\nTypes: deb\nURIs: http://m.example/debian\nSuites: bookworm\n"
    )
    with pytest.raises(SetupError, match="set EDGEFORGE_DEBIAN_MIRROR to the address of one"):
        find_mirror(apt)


def test_the_variable_wins_and_must_be_an_address(apt, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_DEBIAN_MIRROR", "https://m.example/d/")
    assert find_mirror(apt) == "https://m.example/d"
    monkeypatch.setenv("EDGEFORGE_DEBIAN_MIRROR", "file:///etc")
    with pytest.raises(SetupError, match="give an address that begins with http"):
        find_mirror(apt)


@pytest.fixture
def package(mirror, monkeypatch, deb, sha256):
    """A pinned package, which the mirror has."""
    content = deb(("./usr/bin/x", b"1"))
    monkeypatch.setenv("EDGEFORGE_DEBIAN_MIRROR", mirror.address)
    mirror.files["pool/x_1.deb"] = content
    return Package(
        "x", "1", "bookworm", "arm64", "pool/x_1.deb", sha256(content), len(content), "python"
    )


def test_packages_are_brought_once(mirror, package, place):
    (file,), replaced = bring_packages([package], no_progress)
    assert file.read_bytes() == mirror.files["pool/x_1.deb"] and replaced == {}
    assert bring_packages([package], no_progress) == ([file], {})
    assert len(mirror.asked) == 1


def test_a_package_of_another_digest_is_refused(mirror, package, place):
    mirror.files["pool/x_1.deb"] = b"!" * package.size
    with pytest.raises(SetupError, match="not the pinned sha256"):
        bring_packages([package], no_progress)


def test_a_damaged_download_is_brought_again(mirror, package, place):
    (file,), _ = bring_packages([package], no_progress)
    file.write_bytes(b"damaged")
    assert bring_packages([package], no_progress) == ([file], {})
    assert file.read_bytes() == mirror.files["pool/x_1.deb"]


def release_of(mirror, sha256, index):
    packed = lzma.compress(index.encode())
    mirror.files["dists/bookworm/main/binary-arm64/Packages.xz"] = packed
    listed = f" {sha256(packed)} {len(packed)} main/binary-arm64/Packages.xz\n"
    return f"SHA256:\n {'0' * 64} 5 main/a\n{listed}"


def test_a_replaced_package_is_taken_as_the_signed_index_names_it(
    mirror, package, place, sha256, deb, monkeypatch
):
    newer = deb(("./usr/bin/x", b"2"))
    del mirror.files["pool/x_1.deb"]
    mirror.files["pool/x_2.deb"] = newer
    index = (
        f"Package: x\nVersion: 2\nFilename: pool/x_2.deb\nSHA256: {sha256(newer)}\n"
        f"Size: {len(newer)}\n"
    )
    signed = release_of(mirror, sha256, index)
    monkeypatch.setattr(debian_index, "_signed_release", lambda *_: signed)
    (file,), replaced = bring_packages([package], no_progress)
    assert file.read_bytes() == newer and replaced == {"x": "2"}


def test_a_release_that_debian_did_not_sign_is_refused(mirror, package, place, sha256):
    del mirror.files["pool/x_1.deb"]
    mirror.files["dists/bookworm/InRelease"] = release_of(mirror, sha256, "").encode()
    with pytest.raises(SetupError, match="has no good signature of Debian's archive"):
        bring_packages([package], no_progress)


def test_without_debian_s_keys_a_replacement_is_refused(mirror, package, place, tmp_path):
    with pytest.raises(SetupError, match="install gpgv and debian-archive-keyring"):
        read_index(mirror.address, "bookworm", "arm64", tmp_path, keyring=tmp_path / "none")


def test_an_index_of_another_digest_than_was_signed_is_refused(
    mirror, package, place, sha256, monkeypatch
):
    signed = release_of(mirror, sha256, "Package: x\n")
    mirror.files["dists/bookworm/main/binary-arm64/Packages.xz"] = lzma.compress(b"Package: y\n")
    monkeypatch.setattr(debian_index, "_signed_release", lambda *_: signed)
    with pytest.raises(SetupError, match=r"Packages\.xz from .*(digest|longer)"):
        read_index(mirror.address, "bookworm", "arm64", place)


def test_pins_name_no_host_and_the_versions_of_the_lock_files():
    from pathlib import Path

    root = Path(__file__).parents[4]
    locks = "".join(
        (root / f"requirements/lock-{n}.txt").read_text() for n in ("run", "executorch")
    )
    for wheel in read_pins().wheels:
        assert f"\n{wheel.name}=={wheel.version}\n" in locks
    text = (root / "device_harness/devices/arm64/pins.json").read_text()
    assert "://" not in text
    assert all(len(pin.sha256) == 64 and pin.size > 0 for pin in read_pins().packages)
