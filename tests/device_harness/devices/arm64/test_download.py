"""Downloads that are cut, wrong, endless or not there."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO

import pytest

from device_harness.devices.arm64.download import NotOnMirrorError, fetch
from device_harness.devices.arm64.pins import Member
from device_harness.devices.arm64.remote_wheel import NoRangesError, fetch_members
from device_harness.errors import SetupError

CONTENT = bytes(range(256)) * 4096


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def digest(mirror, sha256):
    mirror.files["f.deb"] = CONTENT
    return sha256(CONTENT)


def test_a_cut_download_goes_on_where_it_ended(mirror, digest, tmp_path):
    mirror.cuts["f.deb"] = [300_000, 200_000]
    told = []
    file = fetch(
        f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT), lambda *t: told.append(t)
    )
    assert file.read_bytes() == CONTENT
    places = [begin for _, begin in mirror.asked]
    assert len(places) == 3 and places[0] == 0 and 0 < places[1] <= 300_000 < places[2] <= 500_000
    assert told[-1][1:] == (len(CONTENT), len(CONTENT))


def test_what_a_dead_process_had_brought_is_not_brought_again(mirror, digest, tmp_path):
    (tmp_path / "f.partial").write_bytes(CONTENT[:700_000])
    fetch(f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT))
    assert mirror.asked == [("f.deb", 700_000)]
    assert (tmp_path / "f").read_bytes() == CONTENT and not (tmp_path / "f.partial").exists()


def test_a_beginning_of_another_file_is_given_up(mirror, digest, tmp_path):
    (tmp_path / "f.partial").write_bytes(b"x" * 1000)
    fetch(f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_without_ranges_begins_again(mirror, digest, tmp_path):
    mirror.knows_ranges = False
    (tmp_path / "f.partial").write_bytes(CONTENT[:1000])
    fetch(f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_what_is_whole_is_not_asked_for(mirror, digest, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    fetch(f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT))
    assert mirror.asked == []


def test_another_content_is_refused_and_not_kept(mirror, digest, tmp_path):
    mirror.files["f.deb"] = CONTENT[:-1] + b"!"
    with pytest.raises(SetupError, match=f"f.deb from .* not the pinned sha256:{digest}"):
        fetch(f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT))
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_always_cut_says_what_is_kept(mirror, digest, tmp_path):
    mirror.cuts["f.deb"] = [1000] * 50
    with pytest.raises(SetupError, match=r"the connection was cut; its first \d+ bytes are kept"):
        fetch(f"{mirror.address}/f.deb", tmp_path / "f", digest, len(CONTENT))
    assert (tmp_path / "f.partial").stat().st_size >= 1000 and not (tmp_path / "f").exists()


def test_a_file_without_end_is_refused(mirror, sha256, tmp_path):
    mirror.files["f.deb"] = CONTENT
    with pytest.raises(SetupError, match=r"longer than the 1000 bytes that it should have"):
        fetch(f"{mirror.address}/f.deb", tmp_path / "f", sha256(CONTENT), 1000)
    assert not (tmp_path / "f").exists()


def test_an_unknown_file_is_told_apart(mirror, tmp_path):
    with pytest.raises(NotOnMirrorError, match=r"has no f\.deb"):
        fetch(f"{mirror.address}/pool/f.deb", tmp_path / "f", "0" * 64)


def test_a_server_that_is_not_there_is_one_sentence_without_a_password(tmp_path):
    with pytest.raises(SetupError) as caught:
        fetch("http://me:secret@127.0.0.1:1/f.deb", tmp_path / "f", "0" * 64)
    assert re.fullmatch(r"f\.deb cannot be fetched from http://127\.0\.0\.1: .+", str(caught.value))


@pytest.fixture
def wheel(mirror, sha256):
    """A wheel on the mirror, and the two files that are wanted of it."""
    files = {
        "torch/lib/liba.so": CONTENT,
        "torch/lib/libb.so": CONTENT[::-1],
        "torch/big": CONTENT * 9,
    }
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    mirror.files["torch.whl"] = packed.getvalue()
    return [Member(name, sha256(files[name]), len(files[name])) for name in list(files)[:2]]


def test_files_of_a_wheel_come_without_the_rest(mirror, wheel, tmp_path, monkeypatch):
    monkeypatch.setattr("device_harness.devices.arm64.remote_wheel._BLOCK", 1 << 16)
    files = fetch_members(f"{mirror.address}/torch.whl", wheel, tmp_path)
    assert [file.read_bytes() for file in files] == [CONTENT, CONTENT[::-1]]
    assert len({begin for _, begin in mirror.asked}) << 16 < len(mirror.files["torch.whl"]) // 2
    before = len(mirror.asked)
    assert fetch_members(f"{mirror.address}/torch.whl", wheel, tmp_path) == files
    assert len(mirror.asked) == before


def test_a_changed_file_of_a_wheel_is_refused(mirror, wheel, tmp_path):
    wrong = [Member(wheel[0].path, "0" * 64, wheel[0].size)]
    with pytest.raises(SetupError, match=r"liba\.so of torch\.whl has the digest"):
        fetch_members(f"{mirror.address}/torch.whl", wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_server_without_ranges_is_told_apart(mirror, wheel, tmp_path):
    mirror.knows_ranges = False
    with pytest.raises(NoRangesError):
        fetch_members(f"{mirror.address}/torch.whl", wheel, tmp_path)
