"""The command that is installed: it runs the command line and turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

import typer

from edgeforge.cli.app import app
from edgeforge.cli.exits import ended_by_signals, explain, one_line
from edgeforge.cli.streams import open_streams, print_traceback, require_utf8, speak_utf8

# The variable by which a shell asks for completions, as click derives it from the command's name.
_COMPLETE = "_EDGEFORGE_COMPLETE"


def main() -> None:
    """Runs the command line; an error meant for users becomes one line and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--traceback"]
    if hasattr(sys.stdout, "reconfigure"):  # escape characters that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    signals: list[int] = []
    try:
        require_utf8(arguments)
        with ended_by_signals(signals):
            _run_command(arguments or ["--help"])
            sys.stdout.flush()
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        number = signals[0] if signals else signal.SIGINT
        print("edgeforge: interrupted; nothing was left half-written", file=sys.stderr)
        sys.exit(128 + number)
    except BrokenPipeError:
        # The reader of our output has ended, as `head` does. Python flushes stdout at exit, which
        # would print another error, so stdout now goes to /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        if "--traceback" in sys.argv[1:]:
            print_traceback()
        code, sentence = explained
        print(f"edgeforge: {one_line(sentence)}", file=sys.stderr)
        sys.exit(code)


def entry() -> None:
    """Entry point of the installed command: runs `main` and ends the process at once.

    All results are written by then, and an ordinary exit would take a second to tear down torch's
    modules.
    """
    speak_utf8()
    open_streams()
    try:
        main()
        code: int | str | None = 0
    except SystemExit as left:
        code = left.code
    except Exception:  # a bug
        print_traceback()
        code = 1
    if not isinstance(code, int | None):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _run_command(arguments: list[str]) -> None:
    """Runs a command without typer's own runner, which hides Ctrl-C and some of our own bugs."""
    command = typer.main.get_command(app)
    if _COMPLETE in os.environ:  # a shell asks what may follow; no command runs
        command.main(prog_name="edgeforge")
    with command.make_context("edgeforge", arguments) as context:
        command.invoke(context)


if __name__ == "__main__":
    entry()
