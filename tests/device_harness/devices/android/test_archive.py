"""The archive is a tar that Python's own reader reads, cut into chunks of known digests."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile

import pytest

from device_harness.devices.android.archive import Archive
from device_harness.errors import DeviceError


@pytest.fixture
def files(tmp_path):
    contents = {
        "empty": b"",
        "a": b"1" * 512,
        "folder/b c$'é": os.urandom(5000),
        "folder/" + "long" * 40: os.urandom(70_001),
    }
    found = {}
    for at, (name, content) in enumerate(contents.items()):
        found[name] = tmp_path / str(at)
        found[name].write_bytes(content)
    found["a"].chmod(0o755)
    return found


@pytest.mark.parametrize("chunk", [100, 512, 4096, 1 << 20])
def test_chunks_joined_are_a_tar_of_the_files(files, chunk):
    archive = Archive(files, chunk)
    parts = [b"".join(archive.read(each)) for each in archive.chunks]
    for part, each in zip(parts, archive.chunks, strict=True):
        assert hashlib.sha256(part).hexdigest() == each.sha256 and len(part) == each.size
    whole = b"".join(parts)
    assert len(whole) == archive.size and {len(part) for part in parts[:-1]} <= {chunk}
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert tar.getnames() == sorted(files)
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            assert content == files[member.name].read_bytes()
            assert archive.digests[member.name] == hashlib.sha256(content).hexdigest()
            assert member.mode == (0o755 if member.name == "a" else 0o644)


def test_the_same_files_are_the_same_archive_and_others_another(files):
    first = Archive(files)
    os.utime(files["a"], (1, 1))
    assert Archive(dict(reversed(files.items()))).name == first.name
    files["a"].write_bytes(b"2" * 512)
    assert Archive(files).name != first.name


def test_a_file_that_is_missing_or_becomes_shorter_is_one_sentence(files):
    archive = Archive(files)
    files["a"].write_bytes(b"1")
    with pytest.raises(DeviceError, match="became shorter while it was read"):
        b"".join(piece for chunk in archive.chunks for piece in archive.read(chunk))
    files["a"].unlink()
    with pytest.raises(DeviceError, match="cannot be read: No such file"):
        Archive(files)
