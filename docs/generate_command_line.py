"""Writes ``docs/command-line.md``: the help of every command, as the command line prints it.

``python docs/generate_command_line.py`` writes the page. A test fails when it is stale.
"""

from pathlib import Path
from typing import Any

import typer

from edgeforge.cli.app import app

PAGE = Path(__file__).resolve().parent / "command-line.md"
WIDTH = 80

HEAD = """\
# Command line

<!-- Written by `python docs/generate_command_line.py`: edit the help texts in `edgeforge/cli/`. -->

Results go to stdout, as text or, with `--json`, as JSON for machines. Progress and errors go to
stderr. `--traceback`, before the command, shows where an error arose. [Exit codes](exit-codes.md)
lists how a command can end.
"""


def page() -> str:
    """The page's text: it depends on the commands alone, not on the terminal."""
    group = typer.main.get_command(app)
    with group.make_context("edgeforge", [], resilient_parsing=True) as context:
        context.terminal_width = WIDTH
        parts = [HEAD, _section("edgeforge", context.get_help())]
        for name, command in sorted(group.commands.items()):
            parts += _sections(f"edgeforge {name}", name, command, context)
    return "\n".join(parts)


def _sections(title: str, name: str, command: Any, parent: Any) -> list[str]:
    """A command, and the commands of a group of them."""
    with command.make_context(name, [], parent=parent, resilient_parsing=True) as context:
        found = [_section(title, context.get_help())]
        for inner, each in sorted(getattr(command, "commands", {}).items()):
            found += _sections(f"{title} {inner}", inner, each, context)
        return found


def _section(title: str, help_text: str) -> str:
    lines = [line.rstrip() for line in help_text.splitlines()]
    return "\n".join([f"## `{title}`", "", "```text", *lines, "```", ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
