"""Closed streams, readers that leave, and locales without UTF-8."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("cache")
EDGEFORGE = f"{sys.executable} -m edgeforge"


def shell(line: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    """Runs a line of the shell, in which $E is EdgeForge and $1, $2, ... are words."""
    return subprocess.run(
        ["bash", "-c", line.replace("$E", EDGEFORGE), "bash", *map(str, words)],
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "code"),
    [("list recipes", 0), ("--help", 0), ("inspect /nowhere", 5), ("list nothing", 2)],
)
def test_closed_streams_change_no_exit_code(command, code, closed):
    done = shell(f"$E {command} {closed}")
    assert done.returncode == code
    assert b"Traceback" not in done.stdout + done.stderr
    assert b"Error" not in done.stderr
    # What is left open gets what it would have got.
    if closed == ">&-" and code:
        assert done.stderr.startswith(b"edgeforge: ")
    if closed == "2>&-" and not code:
        assert len(done.stdout) > 100


def test_inspect_prints_tables_into_a_closed_stream(artifact):
    for closed in (">&-", "2>&-"):
        assert shell(f'$E inspect "$1" {closed}', artifact).returncode == 0


def test_what_a_file_gets_is_no_message_of_a_closed_stderr(tmp_path):
    """The numbers of closed streams are taken at once, before a file could get one of them."""
    line = '$E synth tiny-llama --out "$1" 2>&- && $E synth tiny-llama --out "$2"'
    done = shell(line, tmp_path / "one", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for file in (tmp_path / "two").iterdir():
        assert (tmp_path / "one" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("command", "code"), [('run "$1" -p a -n 2', 0), ("inspect /nowhere", 5), ("list recipes", 0)]
)
def test_errors_may_have_no_reader(artifact, command, code):
    line = f"{{ $E {command} 2>&3 3>&- >/dev/null; echo $? >&4; }} 3> >(exec true) 4>&1; wait"
    slow = line.replace("$E", "sleep 0.2; $E", 1)  # the reader has left by then
    assert shell(slow, artifact).stdout.decode().split() == [str(code)]


def test_tables_whose_reader_leaves_end_as_other_results_do(artifact):
    line = '$E inspect "$1" | true; echo ${PIPESTATUS[0]}'
    assert shell(line, artifact).stdout.strip() == b"141"
    line = '$E verify "$1" -q --no-timed --tokens 16 | true; echo ${PIPESTATUS[0]}'
    done = shell(line, artifact)
    assert done.stdout.strip() == b"141" and b"Traceback" not in done.stderr


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_locale_without_utf8_reads_prompts_and_paths(artifact, tmp_path):
    named = tmp_path / "größe"
    named.symlink_to(artifact)
    found = [
        shell('$E run "$1" -p "größe" -n 3 --json', each, **environment)
        for each, environment in ((artifact, {}), (named, ASCII))
    ]
    assert [each.returncode for each in found] == [0, 0], found[1].stderr
    assert b'"prompt_tokens": 8' in found[1].stdout and found[1].stdout.isascii()
    shown = shell('$E inspect "$1"', named, **ASCII)
    assert shown.returncode == 0 and shown.stdout.isascii() and b"\\xf6" in shown.stdout


def test_a_name_that_is_no_utf8_is_a_sentence(tmp_path):
    for command in (r"export demo --out $'a\xff'", r"run . -p $'a\xff'"):
        done = shell(f"$E {command}")
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert rb"a\udcff' is not UTF-8 text" in done.stderr
