"""A program on a phone: its streams, its end, and nothing left of it."""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest

from device_harness.devices.android.process import PhoneProcess, sweep
from device_harness.errors import DeviceError

RUN = "data/local/tmp/edgeforge/run"


@pytest.fixture
def start(reached):
    """Starts programs, and ends them with the test."""
    started = []

    def start(*command, environment=None, silence=20.0):
        process = PhoneProcess(reached, command, environment or {}, silence)
        started.append(process)
        return process

    yield start
    for process in started:
        process.close()


def is_alive(pid):
    """Whether a process runs; one that ended and was not yet looked at does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_streams_are_clean_in_both_directions(start):
    process = start("cat")
    content = os.urandom(1_000_000)
    process.requests.write(content)
    process.requests.flush()
    assert process.answers.read(len(content)) == content
    assert process.wait(0) is None
    process.requests.close()
    assert process.answers.read() == b"" and process.wait(10) == 0


def test_arguments_and_environment_arrive_as_they_are(start):
    odd = ["$(touch x)", "a b", "'\"`", "*", "é\n"]
    process = start("sh", "-c", 'printf "%s|" "$@" "$ODD"', "sh", *odd, environment={"ODD": odd[0]})
    assert process.answers.read().decode() == "|".join([*odd, odd[0], ""])


def test_the_android_loaders_variables_are_not_handed_on(start):
    process = start("sh", "-c", 'echo "[$LD_PRELOAD$LD_LIBRARY_PATH]"')
    assert process.answers.read() == b"[]\n"


@pytest.mark.parametrize(
    ("ends", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("kill -11 $$", 139)]
)
def test_its_end_and_last_words_are_told(start, ends, code):
    process = start("sh", "-c", f"echo 'all \033[31mis lost' >&2; {ends}")
    assert process.answers.read() == b""
    assert process.wait(10) == code and process.last_words() == "all is lost\n"


def test_a_program_that_is_not_there(start):
    process = start("/nonexistent/program")
    assert process.answers.read() == b"" and process.wait(10) == 127
    assert "/nonexistent/program" in process.last_words()


def test_closing_ends_it_and_its_children_and_removes_its_folder(start, tmp_path):
    line = ": edgeforge/; trap '' TERM HUP; sleep 300 & echo $$ $!; sleep 301"
    process = start("sh", "-c", line)
    pids = [int(word) for word in process.answers.readline().split()]
    assert all(is_alive(pid) for pid in pids)
    process.close()
    until(lambda: not any(is_alive(pid) for pid in pids))
    assert not list((tmp_path / "phone" / RUN).iterdir())
    process.close()


def test_another_program_with_its_number_is_left_alone(start, tmp_path):
    # The number of a process is given anew once the process has ended.
    process = start("sh", "-c", "echo $$; exec sleep 300")
    pid = int(process.answers.readline())
    process.close()
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_one_killed_for_memory_is_told_by_its_exit_code(start, virtual_phone):
    process = start("sh", "-c", "echo ready; read -r line; head -c 1000000 /dev/zero; sleep 300")
    assert process.answers.readline() == b"ready\n"
    virtual_phone.set_fault("killed", 100_000)
    process.requests.write(b"go\n")
    process.requests.flush()
    process.answers.read()
    assert process.wait(10) == 128 + signal.SIGKILL


def test_an_unplugged_phone_is_an_error_of_the_stream_and_leaves_no_orphan(
    start, virtual_phone, tmp_path
):
    process = start("sh", "-c", ": edgeforge/; echo $$; cat; sleep 300")
    pid = int(process.answers.readline())
    virtual_phone.drop_connections()
    with pytest.raises(ConnectionError, match="plug it in again"):
        process.answers.read(1)
    assert process.wait(0.1) is None and is_alive(pid)
    process.close()  # adb finds the phone again within moments
    until(lambda: not is_alive(pid))
    assert not list((tmp_path / "phone" / RUN).iterdir())


def test_silence_ends_in_time(start, virtual_phone):
    process = start("cat", silence=0.4)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        process.answers.read(1)
    assert time.monotonic() - started < 20


def test_a_shell_that_hangs_at_the_start_is_one_sentence(start, virtual_phone, monkeypatch):
    monkeypatch.setattr("device_harness.devices.android.process._START_SECONDS", 0.4)
    virtual_phone.set_fault("hung-shell")
    with pytest.raises(DeviceError, match="does not answer in starting a program"):
        start("cat")


def test_noise_at_the_start_is_one_sentence(start, virtual_phone):
    virtual_phone.set_fault("garbage")
    with pytest.raises(DeviceError) as caught:
        start("cat")
    assert str(caught.value).isprintable() and "does not start programs" in str(caught.value)


def test_memory_is_sampled_every_half_second(start):
    process = start("sh", "-c", "x=$(head -c 30000000 /dev/zero | tr '\\0' a); echo; read -r line")
    process.answers.readline()
    until(lambda: len(process.memory.samples) >= 3)
    assert process.memory.peak_bytes > 30_000_000
    seconds = [at for at, _ in process.memory.samples]
    assert all(0.3 < b - a < 1.5 for a, b in pairwise(seconds[1:]))
    process.requests.close()
    assert process.wait(10) == 1


def test_memory_of_what_it_started_is_counted_too(start):
    line = "sh -c 'x=$(head -c 30000000 /dev/zero | tr \"\\0\" a); echo; read -r line'; :"
    process = start("sh", "-c", line)
    process.answers.readline()
    until(lambda: process.memory.peak_bytes > 30_000_000)


def test_what_a_host_that_died_left_is_cleared_away(start, reached, tmp_path):
    process = start("sh", "-c", ": edgeforge/; sleep 300")
    runs = tmp_path / "phone" / RUN
    (runs / "left").mkdir()
    (runs / "left/pid").write_text("999999999\n")
    (runs / "begun").mkdir()
    sweep(reached)
    assert {path.name for path in runs.iterdir()} == {"begun", process.folder.rpartition("/")[2]}
