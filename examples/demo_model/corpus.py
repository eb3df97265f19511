"""Rebuild the text of the demo model from Debian's documentation packages.

Every source is a package of HTML pages under a permissive licence. A page becomes one document of
plain paragraphs: markup, navigation, tables and code listings are dropped. Whole documents are set
aside for the held-out text, chosen by a hash of their name, and every paragraph that occurs in the
held-out text is removed from the training side, so that no sentence block is on both sides. A
small part of the training documents, chosen likewise, makes the text that quantization calibrates
on.

Usage::

    python corpus.py --out build/

It writes `train.jsonl` (one document a line), `heldout.txt` and `calibration.txt`, for either a
list of its documents, `heldout_licences.txt` for both, and `sources.json`. The packages are taken
with `apt-get download` and unpacked without installing.
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import json
import re
import subprocess
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path

HELDOUT_SALT = "edgeforge-demo-1"
SHORTEST_DOCUMENT = 1500  # characters; shorter pages are indexes and stubs
SHORTEST_UNIQUE_BLOCK = 24  # characters; shorter blocks ("Returns None.") may repeat everywhere
LONGEST_HELDOUT_DOCUMENT = 40_000  # characters; one huge page would make the text one-sided
CALIBRATION_SALT = "edgeforge-calibration-1"
CALIBRATION_SHARE = 0.0105  # of every source's training characters
LONGEST_CALIBRATION_DOCUMENT = 12_000  # characters; many pages, for the text is short


@dataclass(frozen=True)
class Source:
    """One documentation package: where its pages lie and under which licence its text stands."""

    package: str
    title: str
    licence: str
    pages: str
    """Glob of the pages, relative to the unpacked package."""
    skip: str
    """Regular expression of the pages to leave out, searched in the page's path."""
    heldout_share: float
    """Share of this source's characters to set aside."""


SOURCES = (
    Source(
        "python3.11-doc",
        "Python 3.11 documentation",
        "Python Software Foundation License 2; Copyright 2001-2026 Python Software Foundation",
        "usr/share/doc/python3.11/html/**/*.html",
        r"genindex|py-modindex|/search\.html|/download\.html|/contents\.html|changelog\.html"
        r"|/license\.html|/copyright\.html|_static|whatsnew/index",
        0.024,
    ),
    Source(
        "postgresql-doc-15",
        "PostgreSQL 15 documentation",
        "PostgreSQL License; Copyright 1996-2026 PostgreSQL Global Development Group,"
        " 1994 The Regents of the University of California",
        "usr/share/doc/postgresql-doc-15/html/*.html",
        r"release|bookindex|biblio|/index\.html|features|legalnotice|contributors|keywords-appendix"
        r"|errcodes",
        0.020,
    ),
    Source(
        "python-django-doc",
        "Django 3.2 documentation",
        "BSD 3-Clause; Copyright Django Software Foundation and individual contributors",
        "usr/share/doc/python-django-doc/html/**/*.html",
        r"genindex|py-modindex|/search\.html|/contents\.html|/releases/|_modules|/internals/"
        r"|/glossary",
        0.020,
    ),
    Source(
        "python-sqlalchemy-doc",
        "SQLAlchemy 1.4 documentation",
        "MIT; Copyright 2007-2023 the SQLAlchemy authors and contributors",
        "usr/share/doc/python-sqlalchemy-doc/html/**/*.html",
        r"genindex|py-modindex|/search\.html|/contents\.html|changelog|_modules|copyright",
        0.020,
    ),
    Source(
        "sqlite3-doc",
        "SQLite documentation",
        "Public domain",
        "usr/share/doc/sqlite3/**/*.html",
        r"releaselog|/changes|chronology|/news|/doclist|/keyword_index|/docs\.html|syntaxdiagrams"
        r"|/syntax/|/hlr|/matrix|/requirements|copyright|/th3|/search|/session/|c3ref/(const|func)list"
        r"|oldnews|index\.html",
        0.020,
    ),
    Source(
        "apache2-doc",
        "Apache HTTP Server 2.4 documentation",
        "Apache License 2.0; Copyright The Apache Software Foundation",
        "usr/share/doc/apache2-doc/manual/**/*.html",
        r"/manual/(?!en/)|index\.html|quickreference|/directives\.html|sitemap|new_features|upgrading"
        r"|/license",
        0.020,
    ),
    Source(
        "sphinx-doc",
        "Sphinx 5 documentation",
        "BSD 2-Clause; Copyright 2007-2022 the Sphinx team",
        "usr/share/doc/sphinx-doc/html/**/*.html",
        r"genindex|py-modindex|/search\.html|/contents\.html|_modules|changes|/examples",
        0.0,
    ),
    Source(
        "python-setuptools-doc",
        "Setuptools 66 documentation",
        "MIT; Copyright Python Packaging Authority and contributors",
        "usr/share/doc/python-setuptools-doc/html/**/*.html",
        r"genindex|py-modindex|/search\.html|/contents\.html|history|_modules",
        0.0,
    ),
)

BLOCK_TAGS = frozenset({
    "p", "li", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "div", "section", "dl", "ul",
    "ol", "blockquote", "br", "body", "article", "main", "td", "th", "tr",
})  # fmt: skip
SKIPPED_TAGS = frozenset({
    "script", "style", "table", "pre", "title", "nav", "header", "footer", "form", "select",
    "option", "button", "head", "textarea", "svg",
})  # fmt: skip
SKIPPED_CLASSES = frozenset({
    "sphinxsidebar", "related", "footer", "navheader", "navfooter", "headerlink",
    "toctree-wrapper", "contents", "topic", "highlight", "screen", "programlisting", "synopsis",
    "toc", "TOC", "calstable", "informaltable", "table", "literal-block", "versionadded",
    "versionchanged", "deprecated", "viewcode-link", "mobile-nav", "sidebar-wrapper",
    "fancy_title", "startsearch", "searchmenu", "desktoponly", "nosearch", "menu", "codeblock",
    "imgcontainer", "toplang", "bottomlang", "path", "up", "retired", "outofdate",
    "comments_section", "qv", "quickview", "production-list", "productionlist",
    "docs-top-navigation-container", "docs-left-navigation-container", "docs-bottom-navigation",
    "tutorial_nav", "breadcrumb", "browse-horizontal",
})  # fmt: skip
VOID_TAGS = frozenset({
    "br", "img", "hr", "input", "meta", "link", "col", "wbr", "area", "base", "source",
})  # fmt: skip
REPLACEMENTS = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ",
        "\u2212": "-", "\u2026": "...", "\u00b6": None, "\uf0c1": None, "\u00ad": None,
        "\u200b": None, "\u2192": "->", "\u00a0": " ",
    }
)  # fmt: skip


@dataclass
class _Frame:
    tag: str
    skipped: bool


@dataclass
class _Page(html.parser.HTMLParser):
    """Collects the prose blocks of one HTML page: a `(kind, text)` pair per paragraph or line."""

    blocks: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._stack: list[_Frame] = []
        self._skipping = 0
        self._text: list[str] = []
        self._kind = "p"

    def _flush(self) -> None:
        text = unicodedata.normalize("NFKC", "".join(self._text)).translate(REPLACEMENTS)
        text = re.sub(r"\s+", " ", text).strip()
        self._text.clear()
        if text:
            self.blocks.append((self._kind, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCK_TAGS:
            if not self._skipping:
                self._flush()
            if tag in ("li", "dt", "h1", "h2", "h3", "h4", "h5", "h6"):
                self._kind = "h" if tag[0] == "h" else tag
            elif tag == "dd" or (tag == "p" and not any(f.tag == "li" for f in self._stack)):
                self._kind = "p"
        if tag in VOID_TAGS:
            return
        classes = set((dict(attrs).get("class") or "").split())
        classes.add(dict(attrs).get("id") or "")
        skipped = tag in SKIPPED_TAGS or bool(classes & SKIPPED_CLASSES)
        skipped |= any(name.startswith("highlight-") for name in classes)
        self._skipping += skipped
        self._stack.append(_Frame(tag, skipped))

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCK_TAGS and not self._skipping:
            self._flush()
            self._kind = "p"
        if any(frame.tag == tag for frame in self._stack):
            while True:  # pages leave <p> and <li> open: close whatever the end tag closes
                frame = self._stack.pop()
                self._skipping -= frame.skipped
                if frame.tag == tag:
                    return

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._flush()


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Return the prose blocks of an HTML page as `(kind, text)`; kind is h, p, li or dt."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    kept = []
    for kind, text in parser.blocks:
        letters = sum(c.isalpha() or c == " " for c in text)
        foreign = sum(ord(c) > 126 for c in text)
        if foreign > 0.03 * len(text) or len(text) < 3:
            continue
        if kind in "p li" and (letters < 0.75 * len(text) or len(text) < 20):
            continue
        kept.append((kind, text))
    return kept


def document_of(blocks: list[tuple[str, str]]) -> str:
    """Lay out blocks as plain text: paragraphs apart, list items as lines that begin with a dash.

    >>> print(document_of([("h", "Title"), ("p", "One."), ("li", "a"), ("li", "b"), ("p", "End.")]))
    Title
    <BLANKLINE>
    One.
    <BLANKLINE>
    - a
    - b
    <BLANKLINE>
    End.
    """
    lines: list[str] = []
    previous = ""
    for kind, text in blocks:
        if previous and not (kind == previous == "li"):
            lines.append("")
        lines.append(f"- {text}" if kind == "li" else text)
        previous = kind
    return "\n".join(lines)


@dataclass(frozen=True)
class Document:
    """One page: its name (package and path) and its blocks."""

    name: str
    blocks: tuple[tuple[str, str], ...]

    @property
    def length(self) -> int:
        """Characters of text."""
        return sum(len(text) + 2 for _, text in self.blocks)


def download(package: str, into: Path) -> Path:
    """Fetch and unpack a Debian package below `into`; nothing is installed. Returns its root."""
    root = into / package
    if not root.is_dir():
        archives = into / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        if not list(archives.glob(f"{package}_*.deb")):
            subprocess.run(["apt-get", "download", package], cwd=archives, check=True)
        archive = next(archives.glob(f"{package}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    return root


def package_version(package: str, into: Path) -> str:
    """Version of the unpacked package, from its archive."""
    archive = next((into / "archives").glob(f"{package}_*.deb"))
    command = ["dpkg-deb", "-f", str(archive), "Version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def licence_text(package: str, into: Path) -> str:
    """Copyright notice and licence of an unpacked package's upstream text, from Debian's record."""
    path = next((into / package).glob("usr/share/doc/*/copyright"))
    record = path.read_text(encoding="utf-8")
    if "\nFiles: *\n" not in record:  # Python's record is prose
        start = record.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
        return record[start : record.index("BEOPEN.COM LICENSE AGREEMENT", start)].strip()
    stanzas = re.split(r"\n\s*\n", record)
    files = next(stanza for stanza in stanzas if stanza.startswith("Files: *\n"))
    name = re.search(r"^License: *(\S+)", files, re.MULTILINE)
    assert name is not None, f"{path} names no licence for its files"
    start = f"License: {name[1]}\n "
    terms = next((stanza for stanza in stanzas if stanza.startswith(start)), "")
    text = files.partition("\n")[2] + "\n\n" + terms.partition("\n")[2]
    return re.sub(r"^ \.?", "", text, flags=re.MULTILINE).strip()


def read_documents(source: Source, root: Path, seen: set[str]) -> list[Document]:
    """Read a source's pages; a block that an earlier page already had is dropped (`seen` grows)."""
    documents = []
    for path in sorted(root.glob(source.pages)):
        name = f"{source.package}/{path.relative_to(root)}"
        if path.is_symlink() or re.search(source.skip, f"/{path.relative_to(root)}"):
            continue
        fresh: list[tuple[str, str]] = []
        for kind, text in blocks_of(path.read_text(encoding="utf-8", errors="replace")):
            key = text.casefold()
            if len(text) >= SHORTEST_UNIQUE_BLOCK:
                if key in seen:
                    continue
                seen.add(key)
            fresh.append((kind, text))
        document = Document(name, tuple(fresh))
        if document.length >= SHORTEST_DOCUMENT:
            documents.append(document)
    return documents


def choose_documents(documents: list[Document], share: float, salt: str, longest: int) -> set[str]:
    """Choose whole documents by the hash of their name until `share` of the characters is reached.

    A name's hash does not change when other pages come or go, so the choice is stable.
    """
    target = share * sum(document.length for document in documents)
    chosen: set[str] = set()
    taken = 0
    for document in sorted(
        documents, key=lambda d: hashlib.sha256((salt + d.name).encode()).digest()
    ):
        if taken >= target:
            break
        if document.length <= longest:
            chosen.add(document.name)
            taken += document.length
    return chosen


def choose_heldout(documents: list[Document], share: float) -> set[str]:
    """The documents that evaluation keeps for itself."""
    return choose_documents(documents, share, HELDOUT_SALT, LONGEST_HELDOUT_DOCUMENT)


def choose_calibration(documents: list[Document]) -> set[str]:
    """Among the training documents, those that quantization calibrates on."""
    return choose_documents(
        documents, CALIBRATION_SHARE, CALIBRATION_SALT, LONGEST_CALIBRATION_DOCUMENT
    )


def write_text(out: Path, stem: str, documents: list[Document]) -> str:
    """Write a text and the list of its documents; return the text."""
    text = "\n\n\n".join(document_of(list(d.blocks)) for d in documents) + "\n"
    (out / f"{stem}.txt").write_text(text, encoding="utf-8")
    names = "".join(f"{d.name}\n" for d in documents)
    (out / f"{stem}_documents.txt").write_text(names, encoding="utf-8")
    return text


def build(out: Path, cache: Path) -> None:
    """Write the training documents, the held-out text and the record of sources below `out`."""
    seen: set[str] = set()
    training: list[Document] = []
    heldout: list[Document] = []
    records = []
    for source in SOURCES:
        documents = read_documents(source, download(source.package, cache), seen)
        chosen = choose_heldout(documents, source.heldout_share)
        training += [d for d in documents if d.name not in chosen]
        heldout += [d for d in documents if d.name in chosen]
        record = asdict(source) | {
            "version": package_version(source.package, cache),
            "documents": len(documents),
            "characters": sum(d.length for d in documents),
            "heldout_documents": len(chosen),
        }
        records.append({k: v for k, v in record.items() if k not in ("pages", "skip")})
        print(record["package"], record["documents"], record["characters"], len(chosen))
    # Long blocks are unique already; short ones ("Return value:") may still be on both sides.
    secret = {text.casefold() for d in heldout for _, text in d.blocks}
    removed = 0
    cleaned: list[Document] = []
    out.mkdir(parents=True, exist_ok=True)
    with (out / "train.jsonl").open("w", encoding="utf-8") as file:
        for document in training:
            blocks = [b for b in document.blocks if b[1].casefold() not in secret]
            removed += len(document.blocks) - len(blocks)
            cleaned.append(Document(document.name, tuple(blocks)))
            row = {"name": document.name, "text": document_of(blocks)}
            file.write(json.dumps(row) + "\n")
    calibration: set[str] = set()
    for source in SOURCES:
        if source.heldout_share:  # then the licences below are this source's too
            pages = [d for d in cleaned if d.name.startswith(source.package + "/")]
            calibration |= choose_calibration(pages)
    text = write_text(out, "heldout", heldout)
    chosen_pages = [d for d in cleaned if d.name in calibration]
    calibration_text = write_text(out, "calibration", chosen_pages)
    notices = [
        f"{r['title']} (Debian package {r['package']} {r['version']})\n\n"
        + licence_text(r["package"], cache)
        for r in records
        if r["heldout_documents"]
    ]
    head = "heldout.txt holds the prose of pages of the works below; all else was left out.\n"
    rule = "\n\n" + "-" * 80 + "\n\n"
    (out / "heldout_licences.txt").write_text(rule.join([head, *notices]) + "\n", encoding="utf-8")
    summary = {"sources": records, "blocks_removed_from_training": removed}
    (out / "sources.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"training {len(training)} documents, held out {len(heldout)}, {len(text)} characters")
    print(f"calibration {len(chosen_pages)} documents, {len(calibration_text)} characters")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Rebuild the text of the demo model.")
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--cache", type=Path, help="unpacked packages (default: OUT/packages)")
    arguments = parser.parse_args()
    build(arguments.out, arguments.cache or arguments.out / "packages")


if __name__ == "__main__":
    main()
