"""Only regular files are opened, and only so much of them is read."""

import os
import signal
import socket

import pytest

from quant.input_files import open_descriptor, open_input, read_input, require_regular


@pytest.fixture(autouse=True)
def no_waiting():
    """Ends a test that waits for a pipe's writer."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


OPENERS = (open_input, open_descriptor, require_regular, lambda path: read_input(path, 1 << 20))


@pytest.mark.parametrize("opener", OPENERS)
def test_a_pipe_a_socket_and_devices_are_refused(tmp_path, opener):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        for name, kind in (("pipe", "pipe"), ("link", "pipe"), ("zero", "device"), ("s", "socket")):
            with pytest.raises(OSError) as caught:
                opener(tmp_path / name)
            assert caught.value.strerror.startswith("it is a ") and kind in caught.value.strerror
            assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("opener", OPENERS)
def test_a_folder_and_what_is_not_there_are_refused(tmp_path, opener):
    with pytest.raises(IsADirectoryError):
        opener(tmp_path)
    with pytest.raises(FileNotFoundError):
        opener(tmp_path / "none")


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="this system has no /proc")
@pytest.mark.parametrize("opener", OPENERS)
def test_files_that_the_kernel_makes_up_are_refused(tmp_path, opener):
    (tmp_path / "link").symlink_to("/proc/self/environ")
    with pytest.raises(OSError) as caught:
        opener(tmp_path / "link")
    assert "a file of the kernel" in caught.value.strerror


def test_a_file_is_read_up_to_its_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert read_input(tmp_path / "link", 5) == b"12345"
    with open_input(tmp_path / "file") as stream:
        assert stream.read() == b"12345"
    with pytest.raises(OSError) as caught:
        read_input(tmp_path / "file", 4)
    assert caught.value.strerror == "it has 5 bytes, and at most 4 are read of such a file"
