"""A benchmark's table goes into its block of a page, and nowhere else."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = """# Speed

Before.

<!-- begin one -->
old
<!-- end one -->

Between.

<!-- begin two -->
<!-- end two -->
After.
"""
ROWS = [["", "ms"], ["a|b", " 1.5"]]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    path = ROOT / "benchmarks" / "pages.py"
    spec = importlib.util.spec_from_file_location("benchmark_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "speed.md").write_text(PAGE)
    return tmp_path


def test_a_block_says_what_was_measured_where_when_and_how(pages, folder):
    command = ["python", "benchmarks/x.py", "--size", "3"]
    page = pages.write_block("one", ROWS, "A sentence.", command=command, folder=folder)
    assert page == folder / "speed.md"
    text = page.read_text()
    block = re.search("<!-- begin one -->(.*)<!-- end one -->", text, re.DOTALL)[1]
    assert re.search(r"Measured on 20\d\d-\d\d-\d\d on .*, \d+ cores? used, \d+ GiB", block)
    assert "$ python benchmarks/x.py --size 3\n" in block
    assert "A sentence.\n\n|  | ms |\n|---|---|\n| a\\|b | 1.5 |\n" in block
    assert "old" not in text
    # All else is as it was, and writing again replaces what was written.
    assert text.replace(block, "\nold\n") == PAGE
    pages.write_block("one", ROWS, command=command, folder=folder)
    assert page.read_text().count("Measured on") == 1


def test_an_empty_block_is_filled_and_its_neighbour_left(pages, folder):
    page = pages.write_block("two", ROWS, command=["python"], folder=folder)
    text = page.read_text()
    assert "<!-- begin one -->\nold\n<!-- end one -->" in text
    assert text.endswith("| a\\|b | 1.5 |\n\n<!-- end two -->\nAfter.\n")


def test_an_unknown_block_is_refused_with_those_there_are(pages, folder):
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"no page has a block 'three'; .* one, two"
    ):
        pages.known_block("three", folder)
    assert pages.known_block("two", folder) == "two"


def test_two_blocks_of_one_name_are_refused(pages, folder):
    (folder / "quality.md").write_text("<!-- begin one -->\n<!-- end one -->\n")
    with pytest.raises(ValueError, match="two blocks are named one"):
        pages.blocks(folder)


def test_folders_of_this_machine_are_left_out_of_the_command(pages, monkeypatch):
    arguments = ["/somewhere/benchmarks/x.py", "--workdir", "/home/someone/folder", "--size", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert pages.this_command() == [
        *("python", "benchmarks/x.py", "--workdir", "folder", "--size", "3")
    ]


def test_the_processor_is_what_the_system_says(pages, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast 9000\nflags\t: a\n")
    assert pages.processor(tmp_path / "cpuinfo") == "Fast 9000"
    assert pages.processor(tmp_path / "none").endswith(" processor")


def test_every_script_with_a_table_of_a_page_takes_the_option(pages):
    """Each block's command names a script that can write it again."""
    for name, page in pages.blocks().items():
        body = re.search(rf"begin {name} -->(.*?)<!-- end {name}", page.read_text(), re.DOTALL)[1]
        for script in re.findall(r"^\$ python (benchmarks/\w+\.py)", body, re.MULTILINE):
            assert "add_page_option(parser)" in (ROOT / script).read_text(), script
