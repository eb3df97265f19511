"""The page of commands is what `--help` says today."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_command_line.py"
    spec = importlib.util.spec_from_file_location("generate_command_line", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked_typer() -> str | None:
    """The version of typer that `make` installs, which lays help texts out."""
    for file in sorted((ROOT / "requirements").glob("*.txt")):
        found = re.search(r"^typer==([^\s;]+)", file.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return None


def test_the_page_is_not_stale():
    if locked_typer() not in (None, version("typer")):
        pytest.skip(f"the page is laid out by typer {locked_typer()}; here is {version('typer')}")
    page = generator()
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), (
        "docs/command-line.md is stale: run `python docs/generate_command_line.py`"
    )


def test_the_page_does_not_depend_on_the_terminal(monkeypatch):
    page = generator()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    monkeypatch.setenv("FORCE_COLOR", "1")
    wide = page.page()
    monkeypatch.setenv("COLUMNS", "50")
    assert page.page() == wide
    assert "\x1b" not in wide


def test_help_texts_fit_80_columns():
    blocks = re.findall(r"```text\n(.*?)```", generator().page(), re.DOTALL)
    assert len(blocks) > 5
    assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == []


def test_every_command_has_a_section():
    import typer

    from edgeforge.cli.app import app

    page = generator().page()
    commands = typer.main.get_command(app).commands
    inner = [
        f"{name} {each}" for name in commands for each in getattr(commands[name], "commands", ())
    ]
    names = [*commands, *inner]
    assert "export" in names and "devices setup" in names
    assert [name for name in names if f"\n## `edgeforge {name}`\n" not in page] == []
