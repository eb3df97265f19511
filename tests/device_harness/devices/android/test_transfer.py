"""An archive arrives whole or not at all; what arrived is not sent again."""

from __future__ import annotations

import os
import shutil

import pytest

from device_harness.devices.android import transfer
from device_harness.devices.android.archive import Archive
from device_harness.devices.android.phone import PhoneGoneError
from device_harness.devices.android.transfer import HOME, install
from device_harness.errors import DeviceError

CHUNK = 256 << 10
SIZE = 3_000_000


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(SIZE))
    (tmp_path / "small").write_bytes(b"small")
    files = {"large": tmp_path / "large", "folder/odd $(touch x) 'é": tmp_path / "small"}
    return Archive(files, CHUNK)


@pytest.fixture
def home(tmp_path):
    """EdgeForge's folder of the phone, where it lies here."""
    return tmp_path / f"phone{HOME}"


def whole(home, archive, tmp_path):
    (folder,) = (home / "installed").iterdir()
    assert folder.name == archive.name and not list((home / "arriving").iterdir())
    assert (folder / "large").read_bytes() == (tmp_path / "large").read_bytes()
    assert (folder / "folder/odd $(touch x) 'é").read_bytes() == b"small"
    return True


def nothing_half_written(home):
    return not [path for path in (home / "installed").iterdir() if (path / ".whole").exists()]


def test_an_unchanged_archive_sends_nothing(reached, archive, home, tmp_path):
    assert install(reached, archive, "it") == f"{HOME}/installed/{archive.name}"
    assert whole(home, archive, tmp_path)
    sent = reached.sent
    assert archive.size <= sent < archive.size + 5000
    install(reached, archive, "it")
    assert reached.sent == sent


def test_what_was_damaged_there_since_is_sent_again(reached, archive, home, tmp_path):
    install(reached, archive, "it")
    (home / "installed" / archive.name / "large").unlink()
    install(reached, archive, "it")
    assert whole(home, archive, tmp_path)


def test_a_cut_in_the_middle_goes_on_and_sends_at_most_one_chunk_twice(
    reached, virtual_phone, archive, home, tmp_path
):
    virtual_phone.set_fault("cut", SIZE // 2)
    install(reached, archive, "it")
    assert virtual_phone.faults.get("cut") is None
    assert whole(home, archive, tmp_path)
    assert archive.size < reached.sent <= archive.size + CHUNK + 5000


def test_an_unplugged_phone_is_said_and_the_next_try_goes_on(
    reached, virtual_phone, archive, home, tmp_path, monkeypatch
):
    monkeypatch.setattr(transfer, "_BACK_SECONDS", 0.5)
    virtual_phone.set_fault("unplugged", SIZE // 2)
    with pytest.raises(PhoneGoneError) as caught:
        install(reached, archive, "the artifact")
    words = str(caught.value)
    assert words.startswith("the artifact did not arrive whole: ") and words.isprintable()
    assert "what has arrived there is not sent twice" in words
    assert nothing_half_written(home)
    virtual_phone.clear_faults()
    assert reached.wait_until_back(20)
    install(reached, archive, "it")
    assert whole(home, archive, tmp_path)
    assert reached.sent <= archive.size + CHUNK + 5000


def test_a_phone_that_lies_about_what_arrived_is_found_out(
    reached, virtual_phone, archive, home, tmp_path
):
    virtual_phone.set_fault("lies", 1000)
    with pytest.raises(DeviceError) as caught:
        install(reached, archive, "the artifact")
    assert f"{reached.name} said that the artifact arrived, but " in str(caught.value)
    assert nothing_half_written(home)
    virtual_phone.clear_faults()
    install(reached, archive, "it")
    assert whole(home, archive, tmp_path)


def test_a_disk_that_becomes_full_leaves_nothing_half_written(
    reached, virtual_phone, archive, home, tmp_path
):
    virtual_phone.set_fault("disk-full", SIZE // 2)
    with pytest.raises(DeviceError, match="is full: free some space on it, and run it again"):
        install(reached, archive, "it")
    assert nothing_half_written(home)
    sent = reached.sent
    virtual_phone.clear_faults()
    install(reached, archive, "it")
    assert whole(home, archive, tmp_path)
    assert reached.sent - sent < archive.size - CHUNK  # it went on from there


def test_too_little_space_is_said_before_anything_is_sent(reached, virtual_phone, archive, home):
    virtual_phone.set_fault("little-space", 4_000_000)
    with pytest.raises(DeviceError) as caught:
        install(reached, archive, "the artifact")
    assert str(caught.value).startswith(
        f"{reached.name} has 4 MB free, and the artifact needs 23 MB"
    )
    assert reached.sent == 0


def test_a_tar_that_cannot_be_unpacked_leaves_nothing(reached, archive, home, tmp_path):
    tar = tmp_path / "phone/system/bin/tar"
    tar.write_text(
        "#!/bin/sh\ncat > /dev/null; echo 'tar: write: No space left on device' >&2; exit 1\n"
    )
    tar.chmod(0o755)
    with pytest.raises(DeviceError, match="became full while it was unpacked"):
        install(reached, archive, "it")
    assert nothing_half_written(home) and not list((home / "installed").iterdir())
    tar.unlink()
    sent = reached.sent
    install(reached, archive, "it")
    assert whole(home, archive, tmp_path) and reached.sent - sent < 5000


def test_a_tar_that_lies_is_found_out(reached, archive, home, tmp_path):
    tar = tmp_path / "phone/system/bin/tar"
    tar.write_text("#!/bin/sh\ncat > /dev/null; exit 0\n")
    tar.chmod(0o755)
    with pytest.raises(DeviceError, match="files are missing or damaged"):
        install(reached, archive, "it")
    assert nothing_half_written(home)


def test_a_home_that_cannot_be_written_is_one_sentence(reached, archive, home):
    shutil.rmtree(home, ignore_errors=True)
    home.write_text("a file")
    with pytest.raises(DeviceError, match="does not let /data/local/tmp/edgeforge be written"):
        install(reached, archive, "it")


@pytest.mark.parametrize("fault", ["garbage", "forgets-exit"])
def test_a_phone_that_talks_nonsense_is_one_sentence(
    reached, virtual_phone, archive, fault, monkeypatch
):
    monkeypatch.setattr(transfer, "_BACK_SECONDS", 0.5)
    virtual_phone.set_fault(fault)
    with pytest.raises(DeviceError) as caught:
        install(reached, archive, "it")
    assert str(caught.value).isprintable() and reached.sent == 0
