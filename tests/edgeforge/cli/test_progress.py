"""Progress: plain lines where there is no terminal, a bar where there is, silence when asked."""

import io
import sys
import threading
import time

import pytest

from edgeforge.cli import progress
from edgeforge.cli.progress import Reporter
from edgeforge.stage_progress import tell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_tell_each_stage_and_its_share_every_few_seconds(capfd, clock):
    with Reporter() as report:
        report("trace", 0, 0)
        clock[0] += 1
        report("quantize", 10, 2000)
        clock[0] += 4
        report("quantize", 500, 2000)
        clock[0] += 2
        report("quantize", 1000, 2000)
        clock[0] += 9
        report("trace", 0, 0)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "    0.0 s  trace",
        "    1.0 s  quantize",
        "    7.0 s  quantize: 50% of 2 k, about 6 s left",
    ]


def test_a_stage_that_begins_again_is_told_again(capfd, clock):
    with Reporter() as report:
        for _ in range(2):
            report("compare", 0, 4)
            clock[0] += 10
            report("compare", 2, 4)
            report("generate", 0, 0)
    assert capfd.readouterr().err.splitlines() == [
        "    0.0 s  compare",
        "   10.0 s  compare: 50% of 4, about 10 s left",
        "   10.0 s  generate",
        "   10.0 s  compare",
        "   20.0 s  compare: 50% of 4, about 10 s left",
    ]


def test_a_bar_that_begins_again_is_shown_again(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Reporter() as report:
        report("compare", 0, 40)
        report("compare", 30, 40)
        report("generate", 0, 8)
        report("compare", 0, 40)
        report("compare", 20, 40)
        visible = [task.description for task in report._bar.tasks if task.visible]
        assert visible == ["compare"]


@pytest.mark.parametrize("quiet", [False, True])
def test_what_a_user_must_not_miss_stays(capfd, monkeypatch, quiet):
    with Reporter(quiet) as report:
        tell(report, "a store\x1b[2J was [bold]damaged[/bold]")
        report("trace", 0, 0)
    told = "warning: a store\\x1b[2J was [bold]damaged[/bold]"
    assert capfd.readouterr().err.splitlines()[0] == told
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Reporter(quiet) as report:
        report("trace", 0, 0)
        tell(report, "a store was [bold]damaged[/bold] " + "x" * 200)
    assert "warning: a store was [bold]damaged[/bold] " + "x" * 200 in sys.stderr.getvalue()


def test_quiet_says_nothing(capfd, monkeypatch):
    with Reporter(quiet=True) as report:
        report("trace", 1, 2)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Reporter(quiet=True) as report:
        report("trace", 1, 2)
    assert sys.stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, capfd):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Reporter() as report:
        report("trace", 0, 0)
        report("quantize", 1_000_000, 4_000_000)
        report("quantize", 4_000_000, 4_000_000)
    shown = terminal.getvalue()
    assert "quantize" in shown and "4 M of 4 M" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased at the end
    assert capfd.readouterr() == ("", "")


def test_the_bar_goes_away_after_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = threading.active_count()
    with pytest.raises(ValueError, match="x"), Reporter() as report:
        report("trace", 0, 0)
        raise ValueError("x")
    patience = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < patience:
        time.sleep(0.01)
    assert threading.active_count() == before  # the thread that draws it has ended


def test_stages_may_come_from_several_threads(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    failures = []

    def work(name):
        try:
            for step in range(100):
                report(f"{name} {step}", step, 100)
        except Exception as error:
            failures.append(error)

    with Reporter() as report:
        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
