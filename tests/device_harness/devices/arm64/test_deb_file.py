"""Packages of Debian, good ones and hostile ones."""

from __future__ import annotations

import os
import tarfile

import pytest

from device_harness.devices.arm64.deb_file import unpack
from device_harness.errors import SetupError


def written(tmp_path, content):
    file = tmp_path / "p.deb"
    file.write_bytes(content)
    return file


def test_files_and_links_are_unpacked_below_usr(tmp_path, deb, link):
    package = written(
        tmp_path,
        deb(
            ("./lib/a/libx.so.1", b"x"),
            link("./lib/a/libx.so", "/lib/a/libx.so.1"),
            link("./usr/bin/y", "../lib/a/libx.so.1"),
            ("./usr/share/doc/z", b"z"),
        ),
    )
    done = unpack(package, tmp_path / "root", lambda name: not name.startswith("usr/share/"))
    assert done == ["usr/lib/a/libx.so.1", "usr/lib/a/libx.so", "usr/bin/y"]
    assert (tmp_path / "root/usr/lib/a/libx.so").read_bytes() == b"x"
    assert os.readlink(tmp_path / "root/usr/lib/a/libx.so") == "libx.so.1"
    assert (tmp_path / "root/usr/bin/y").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["../out", "./a/../../out", "/../out"])
def test_a_path_that_leads_out_is_refused(tmp_path, deb, name):
    with pytest.raises(SetupError, match="outside of its folder"):
        unpack(written(tmp_path, deb((name, b"x"))), tmp_path / "root")
    assert not (tmp_path / "out").exists()


def test_a_link_that_leads_out_is_refused(tmp_path, deb, link):
    with pytest.raises(SetupError, match="outside of its folder"):
        unpack(written(tmp_path, deb(link("./usr/x", "../../../etc"))), tmp_path / "root")


def test_a_file_behind_a_link_that_leads_out_is_refused(tmp_path, deb):
    (tmp_path / "root/usr").mkdir(parents=True)
    (tmp_path / "root/usr/x").symlink_to(tmp_path)
    with pytest.raises(SetupError, match="outside of its folder"):
        unpack(written(tmp_path, deb(("./usr/x/out", b"x"))), tmp_path / "root")
    assert not (tmp_path / "out").exists()


def test_an_absolute_link_stays_inside(tmp_path, deb, link):
    unpack(written(tmp_path, deb(link("./etc/x", "/etc/passwd"))), tmp_path / "root")
    assert os.readlink(tmp_path / "root/etc/x") == "passwd"


def test_devices_are_left_out_and_hard_links_are_copies(tmp_path, deb, link):
    device = tarfile.TarInfo("./dev/sda")
    device.type = tarfile.BLKTYPE
    made = deb(("./usr/a", b"a"), link("./usr/b", "./usr/a", tarfile.LNKTYPE), device)
    assert unpack(written(tmp_path, made), tmp_path / "root") == ["usr/a", "usr/b"]
    assert (tmp_path / "root/usr/b").read_bytes() == b"a"


@pytest.mark.parametrize("cut", [3, 100, 150, 250])
def test_a_package_that_was_cut_is_one_sentence(tmp_path, deb, cut):
    content = deb(("./usr/a", os.urandom(4000)))
    with pytest.raises(SetupError, match=r"p\.deb (is|wants|unpacks)") as caught:
        unpack(written(tmp_path, content[:cut]), tmp_path / "root")
    assert "\n" not in str(caught.value)


def test_another_packing_is_told(tmp_path, deb):
    with pytest.raises(SetupError, match=r"packed as data\.tar\.zst"):
        unpack(written(tmp_path, deb(("./a", b""), packed="zst")), tmp_path / "root")
