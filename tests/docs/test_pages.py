"""What the documentation says exists: links, paths, commands, options, names and diffs.

No site generator takes part. Each checker gives the problems that it finds, and is tried on a text
that is wrong.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PACKAGES = ("edgeforge", "device_harness", "exporters", "quant")

_FENCE = re.compile(r"^(`{3,})([^\n`]*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]\(([^()\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_PATH = re.compile(
    r"(?:edgeforge|device_harness|exporters|quant|benchmarks|examples|tests|docs)/[\w./-]*"
)

Checker = Callable[[str, Path], Iterator[str]]


def fences(text: str, language: str) -> Iterator[str]:
    """The fenced blocks of one language."""
    return (body for _, info, body in _FENCE.findall(text) if info.strip() == language)


def prose(text: str) -> str:
    """A page without its fenced blocks and comments."""
    return _COMMENT.sub("", _FENCE.sub("", text))


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in _HEADING.findall(prose(text)))
    return {title.replace(" ", "-") for title in titles}


def dead_links(text: str, page: Path) -> Iterator[str]:
    for target in _LINK.findall(_CODE.sub("", prose(text))):
        if re.match(r"[a-z]+:", target):
            continue
        where, _, anchor = target.partition("#")
        file = (page.parent / where).resolve() if where else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in slugs(text if file == page else file.read_text("utf-8")):
            yield f"{target}: there is no such heading"


def dead_paths(text: str, page: Path) -> Iterator[str]:
    for code in _CODE.findall(prose(text)):
        if _PATH.fullmatch(code) and not (ROOT / code).exists():
            yield f"{code} does not exist"


@cache
def commands() -> dict[str, dict[str, bool]]:
    """By command, its options, and whether each takes a value; the empty name is for no command.

    A command of a group of commands has both names: ``devices setup``.
    """
    import typer

    from edgeforge.cli.app import app

    group = typer.main.get_command(app)
    found = {"": group, **group.commands}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", {})
        found |= {f"{name} {each}": inner[each] for each in inner}
    return {
        name: {
            "--help": False,
            **{
                option: not getattr(parameter, "is_flag", False)
                for parameter in command.params
                for option in (*parameter.opts, *parameter.secondary_opts)
            },
        }
        for name, command in found.items()
    }


def shown_commands(text: str) -> Iterator[list[str]]:
    """The commands that a page shows: after a prompt in console blocks, or in code spans."""
    lines = [
        line[2:]
        for block in fences(text, "console")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    for line in (*lines, *_CODE.findall(prose(text))):
        if re.match(r"(edgeforge|make|python|pip) ", line):
            yield shlex.split(line, comments=True)


def wrong_commands(text: str, page: Path) -> Iterator[str]:
    for words in shown_commands(text):
        line = shlex.join(words)
        match words:
            case ["edgeforge", *rest]:
                yield from (f"{line}: {problem}" for problem in _wrong_edgeforge(rest))
            case ["make", target, *_]:
                if not re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M):
                    yield f"{line}: the Makefile has no {target}"
            case ["python", script, *rest] if "/" in script:
                yield from (f"{line}: {problem}" for problem in _wrong_script(script, rest))


def _wrong_edgeforge(words: list[str]) -> Iterator[str]:
    name, place = "", 0
    while place < len(words) and words[place].startswith("-"):
        place += 1
    if place < len(words):
        name = words[place]
        if len(words) > place + 1 and f"{name} {words[place + 1]}" in commands():
            name, words = f"{name} {words[place + 1]}", [*words[:place], *words[place + 1 :]]
    if name not in commands():
        yield f"there is no command {name}"
        return
    values: dict[str, str] = {}
    given: list[str] = []
    rest = iter([*words[:place], *words[place + 1 :]])
    for word in rest:
        if word == "--":  # what follows is a runner's, and no option of ours
            break
        if not word.startswith("-"):
            given.append(word)
            continue
        option, equals, value = word.partition("=")
        known = commands()[name] if option in commands()[name] else commands()[""]
        if option not in known:
            yield f"{name or 'edgeforge'} has no option {option}"
        elif known[option]:
            values[option] = value if equals else next(rest, "")
    yield from _wrong_values(name, given, values)


def _wrong_values(name: str, given: list[str], values: dict[str, str]) -> Iterator[str]:
    """Recipes, targets, rotations and lists that do not exist; words in capitals stand for some."""
    from edgeforge.cli.catalogue import catalogue

    for option, kind in (("--recipe", "recipes"), ("--rotation", "rotations")):
        value = values.get(option, "")
        if value and value not in catalogue(kind) and not value.endswith(".yaml"):
            yield f"{kind} have no {value}"
    for value in filter(None, values.get("--target", "").split(",")):
        # The worked example of a target that is to be added.
        if value not in (*catalogue("targets"), "tape"):
            yield f"there is no target {value}"
    if name == "list":
        for value in given:
            if not value.isupper():
                catalogue(value)


def _wrong_script(script: str, words: list[str]) -> Iterator[str]:
    if not (ROOT / script).is_file():
        yield f"{script} does not exist"
        return
    source = (ROOT / script).read_text("utf-8")
    for option in (word for word in words if word.startswith("--")):
        shared = option == "--page" and "add_page_option(parser)" in source
        if f'"{option}"' not in source and not shared:
            yield f"{script} has no option {option}"


def wrong_options(text: str, page: Path) -> Iterator[str]:
    """Options in code spans of their own."""
    known = {option for options in commands().values() for option in options} | {"--page"}
    for code in _CODE.findall(prose(text)):
        option = code.replace("=", " ").split()[0]
        if re.fullmatch(r"--[a-z-]+|-[a-z]", option) and option not in known:
            yield f"no command has the option {option}"


def wrong_python(text: str, page: Path) -> Iterator[str]:
    for block in fences(text, "python"):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            yield f"line {error.lineno} of a block is no Python: {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGES):
                yield from _wrong_names(str(node.module), [alias.name for alias in node.names])
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "edgeforge":
                yield from _wrong_names("edgeforge", [node.attr])


@cache
def modules_of_diffs() -> set[str]:
    """The modules that the worked examples add: one example may import another's."""
    texts = (page.read_text("utf-8") for page in PAGES)
    added = (
        re.findall(r"^--- /dev/null\n\+\+\+ b/(.+)\.py$", block, re.MULTILINE)
        for text in texts
        for block in fences(text, "diff")
    )
    return {file.replace("/", ".") for files in added for file in files}


def _wrong_names(module: str, names: list[str]) -> Iterator[str]:
    if module in modules_of_diffs():
        return
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        yield f"{module} cannot be imported: {error}"
        return
    yield from (f"{module} has no {name}" for name in names if not hasattr(found, name))


def wrong_diffs(text: str, page: Path) -> Iterator[str]:
    for block in fences(text, "diff"):
        if not block.startswith("--- "):
            yield "a diff does not begin with the name of a file"
        for part in re.split(r"^(?=--- )", block, flags=re.MULTILINE)[1:]:
            head, *hunks = re.split(r"^@@[^\n]*\n", part, flags=re.MULTILINE)
            old, new = (line.split(maxsplit=1)[1].strip() for line in head.splitlines()[:2])
            file = ROOT / new.removeprefix("b/")
            lines = [line for hunk in hunks for line in hunk.splitlines()]
            if [line for line in lines if line and line[0] not in " +-"]:
                yield f"the diff of {file.name} has a line that is neither kept, added nor removed"
            if old == "/dev/null":
                if file.exists():
                    yield f"{new} exists already"
                added = "\n".join(line[1:] for line in lines)
                yield from wrong_python(f"```python\n{added}\n```", page)
            elif not file.is_file():
                yield f"{new} does not exist"
            else:
                yield from (f"{new}: {lost}" for lost in _lost_places(file, hunks))


def _lost_places(file: Path, hunks: list[str]) -> Iterator[str]:
    text = "\n" + file.read_text("utf-8")
    for hunk in hunks:
        kept = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
        found = text.count("\n" + "\n".join(kept) + "\n")
        if found != 1:
            yield f"a hunk has {found} places in the file: {kept[0].strip() if kept else hunk!r}"


CHECKERS: dict[str, tuple[Checker, str]] = {
    "links": (dead_links, "see [this](no/such/page.md)"),
    "anchors": (dead_links, "# Title\n\nsee [this](#titel)"),
    "paths": (dead_paths, "it is in `edgeforge/nowhere.py`"),
    "commands": (wrong_commands, "```console\n$ edgeforge exprot demo\n```"),
    "options of commands": (wrong_commands, "run `edgeforge export demo --outt x`"),
    "recipes": (wrong_commands, "run `edgeforge export demo --recipe int5`"),
    "targets": (wrong_commands, "run `edgeforge export demo --target onnx,tflite`"),
    "make": (wrong_commands, "run `make coffee`"),
    "scripts": (wrong_commands, "run `python benchmarks/nothing.py`"),
    "options of scripts": (wrong_commands, "run `python benchmarks/gptq_peers.py --tokens 3`"),
    "options": (wrong_options, "take `--quietly`"),
    "Python": (wrong_python, "```python\nimport edgeforge\nedgeforge.compile('demo')\n```"),
    "imports": (wrong_python, "```python\nfrom quant.formats import Int5\n```"),
    "syntax": (wrong_python, "```python\nprint(\n```"),
    "diffs": (
        wrong_diffs,
        "```diff\n--- a/Makefile\n+++ b/Makefile\n@@ -1 +1 @@\n-no such line\n+a line\n```",
    ),
    "diffs of new files": (
        wrong_diffs,
        "```diff\n--- /dev/null\n+++ b/README.md\n@@ -0,0 +1 @@\n+1\n```",
    ),
}


@pytest.mark.parametrize("kind", CHECKERS)
def test_a_checker_finds_what_is_wrong(kind):
    checker, wrong = CHECKERS[kind]
    assert len(list(checker(wrong, ROOT / "README.md"))) == 1


@pytest.mark.parametrize("checker", dict.fromkeys(each for each, _ in CHECKERS.values()))
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_exists(page, checker):
    assert list(checker(page.read_text("utf-8"), page)) == []


def test_every_page_is_in_the_contents():
    listed = set()
    for body in fences((DOCS / "index.md").read_text("utf-8"), "{toctree}"):
        listed |= {line for line in body.splitlines() if line and not line.startswith(":")}
    there = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert listed == there - {"index"}


def test_the_first_screen_of_the_readme_says_how_to_see_it_work():
    screen = (ROOT / "README.md").read_text("utf-8").splitlines()[:24]
    assert any(line.startswith("$ make demo") for line in screen)
    assert any(line.startswith("$ make test") for line in screen)


def test_the_pages_show_enough_to_check():
    """A change of the patterns above that finds nothing any more would pass every page."""
    texts = [page.read_text("utf-8") for page in PAGES]
    counts = {
        "links": sum(len(_LINK.findall(prose(text))) for text in texts),
        "paths": sum(
            _PATH.fullmatch(c) is not None for t in texts for c in _CODE.findall(prose(t))
        ),
        "commands": sum(len(list(shown_commands(text))) for text in texts),
        "diffs": sum(len(list(fences(text, "diff"))) for text in texts),
    }
    assert counts["links"] > 80 and counts["paths"] > 50 and counts["commands"] > 60
    assert counts["diffs"] == 4
