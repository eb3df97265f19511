"""How the command line ends: exit codes, one line on stderr, signals, readers that leave."""

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("cache")


def test_a_traceback_is_shown_when_asked_for(edgeforge, tmp_path):
    for arguments in (("--traceback", "inspect", tmp_path), ("inspect", tmp_path, "--traceback")):
        shown = edgeforge(*arguments)
        assert shown.code == 5 and shown.out == ""
        assert shown.err.startswith("Traceback (most recent call last):")
        assert "ExportError" in shown.err
        assert shown.err.splitlines()[-1].startswith("edgeforge: ")
        assert "is no EdgeForge artifact" in shown.err.splitlines()[-1]


@pytest.mark.parametrize("bug", [RuntimeError("a bug"), EOFError(), KeyError("x"), OSError(2, "y")])
def test_a_bug_is_not_taken_for_a_users_error(edgeforge, monkeypatch, bug):
    def broken(what):
        raise bug

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", broken)
    with pytest.raises(type(bug)) as caught:
        edgeforge("list", "recipes")
    assert caught.value is bug


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "/x/y"), 5, "/x/y: No space left on device"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "/x/y: Permission denied"),
        (OSError(30, "Read-only file system"), 2, "Read-only file system"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(edgeforge, monkeypatch, error, code, words):
    def refused(what):
        raise error

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", refused)
    shown = edgeforge("list", "recipes")
    assert (shown.code, shown.out, shown.err) == (code, "", f"edgeforge: {words}\n")


def test_a_message_is_one_line_without_terminal_commands(edgeforge, monkeypatch):
    def refused(what):
        from edgeforge.errors import UsageError

        raise UsageError("two\n  lines and \x1b[2J a command, größe 漢字")

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", refused)
    shown = edgeforge("list", "recipes")
    assert shown.err == "edgeforge: two lines and \\x1b[2J a command, größe 漢字\n"


def test_ctrl_c_is_one_line_and_exit_130(edgeforge, monkeypatch):
    def interrupted(what):
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", interrupted)
    shown = edgeforge("list", "recipes")
    assert (shown.code, shown.out) == (130, "")
    assert shown.err == "edgeforge: interrupted; nothing was left half-written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_command_as_ctrl_c_does(edgeforge, monkeypatch, number):
    # Whoever runs the tests may have been started by nohup, which has SIGHUP ignored.
    inherited = signal.signal(number, signal.SIG_DFL)
    unwound = []

    def sent(what):
        try:
            signal.raise_signal(number)
        finally:
            unwound.append(what)

    monkeypatch.setattr("edgeforge.cli.catalogue.catalogue", sent)
    try:
        shown = edgeforge("list", "recipes")
        assert unwound == ["recipes"] and shown.code == 128 + number
        assert shown.err == "edgeforge: interrupted; nothing was left half-written\n"
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, inherited)


def test_a_signal_ends_a_command_though_ctrl_c_is_ignored(edgeforge, monkeypatch):
    monkeypatch.setattr(
        "edgeforge.cli.catalogue.catalogue", lambda what: signal.raise_signal(signal.SIGTERM)
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert edgeforge("list", "recipes").code == 143
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_hang_up_that_nohup_ignores_stays_ignored(edgeforge, monkeypatch):
    monkeypatch.setattr(
        "edgeforge.cli.catalogue.catalogue", lambda what: signal.raise_signal(signal.SIGHUP) or {}
    )
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert edgeforge("list", "recipes").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        shown = subprocess.run(
            [sys.executable, "-m", "edgeforge.cli.entry", "list", "presets"],
            stdout=stream,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert (shown.returncode, shown.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_under_stdout_is_an_error():
    with open("/dev/full", "wb") as full:
        shown = subprocess.run(
            [sys.executable, "-m", "edgeforge.cli.entry", "list", "presets"],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    assert shown.returncode == 5
    assert shown.stderr.startswith(b"edgeforge: No space left on device\n")


def test_text_that_the_terminal_cannot_show_is_escaped(artifact, in_a_process):
    shown = in_a_process(
        "run", artifact, "-p", "x", "-n", "6", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert shown.returncode == 0 and shown.stdout.isascii()


def test_exit_codes_reach_the_shell(tmp_path, in_a_process):
    assert in_a_process("list", "recipes").returncode == 0
    shown = in_a_process("inspect", tmp_path)
    assert shown.returncode == 5 and shown.stdout == b"" and shown.stderr.count(b"\n") == 1
