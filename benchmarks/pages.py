"""Writes a benchmark's table into its page of the documentation, with machine, date and command.

A page under ``docs/benchmarks/`` has blocks, each between two comments that name it. A script that
is given ``--page BLOCK`` replaces what is between them; the prose around a block stays.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
_BLOCK = re.compile(
    r"(?P<begin><!-- begin (?P<name>[a-z0-9-]+) -->\n)(?P<body>.*?)(?P<end><!-- end (?P=name) -->)",
    re.DOTALL,
)


def add_page_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--page``; a block that no page has is refused before anything is measured."""
    parser.add_argument(
        "--page",
        type=known_block,
        metavar="BLOCK",
        help="also write the table into this block of a page under docs/benchmarks/",
    )


def known_block(name: str, folder: Path = PAGES) -> str:
    """The name itself, if a page has a block of that name.

    Raises:
        argparse.ArgumentTypeError: no page has one; says which there are.
    """
    found = blocks(folder)
    if name not in found:
        raise argparse.ArgumentTypeError(
            f"no page has a block {name!r}; there are {', '.join(sorted(found))}"
        )
    return name


def blocks(folder: Path = PAGES) -> dict[str, Path]:
    """Every block by name, with its page.

    Raises:
        ValueError: two blocks have one name.
    """
    found: dict[str, Path] = {}
    for page in sorted(folder.glob("*.md")):
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            if match["name"] in found:
                raise ValueError(f"two blocks are named {match['name']}")
            found[match["name"]] = page
    return found


def write_block(
    name: str,
    rows: Sequence[Sequence[str]],
    about: str = "",
    *,
    command: Sequence[str] = (),
    measured: str = "",
    folder: Path = PAGES,
) -> Path:
    """Writes a table into a block.

    Args:
        name: of the block.
        rows: the table; the first row has the titles of the columns.
        about: a sentence or two on what was measured.
        command: what was run; empty for the script and arguments of this process.
        measured: when and on which machine; empty for today on this one.
        folder: of the pages.

    Returns:
        The page.

    Raises:
        KeyError: no page has the block.
    """
    page = blocks(folder)[name]
    lines = [
        f"Measured on {measured or f'{date.today().isoformat()} on {machine()}'}, by EdgeForge "
        f"{version('edgeforge')}, with",
        "",
        "```console",
        f"$ {shlex.join(command or this_command())}",
        "```",
        "",
        *([about, ""] if about else ()),
        *markdown(rows),
    ]
    body = "\n".join(["", *lines, "", ""])

    def replaced(match: re.Match[str]) -> str:
        return match["begin"] + body + match["end"] if match["name"] == name else match[0]

    page.write_text(_BLOCK.sub(replaced, page.read_text(encoding="utf-8")), encoding="utf-8")
    return page


def markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    r"""Lines of a Markdown table.

    >>> print(*markdown([["", "ms"], ["a|b", "1"]]), sep="\n")
    |  | ms |
    |---|---|
    | a\|b | 1 |
    """
    for index, row in enumerate(rows):
        yield "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |"
        if index == 0:
            yield "|" + "---|" * len(row)


def machine() -> str:
    """The computer and its load, for people."""
    return f"{computer()}, load average {os.getloadavg()[0]:.1f}"


def computer() -> str:
    """Processor, cores that this process may use, and memory, for people."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {cores} core{'s' * (cores != 1)} used, {gibibytes:.0f} GiB of memory"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system tells it."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return f"a {os.uname().machine} processor"


def this_command() -> list[str]:
    """The command that runs, as a reader would type it: folders of this machine are left out."""
    arguments = [Path(part).name if os.path.isabs(part) else part for part in sys.argv[1:]]
    return ["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]
