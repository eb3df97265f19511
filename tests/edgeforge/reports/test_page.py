"""`edgeforge report`: one page that needs no network, with the figures of report.json."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from edgeforge.cards.figures import number, ratio, share
from edgeforge.reports.charts import Point, front
from edgeforge.reports.heat import Heat
from edgeforge.reports.page import LARGEST_PAGE, Entry
from edgeforge.reports.peers import peers_of
from quant.sealed_json import seal, unseal

pytest.importorskip("matplotlib", reason='charts need the extra: pip install "edgeforge[report]"')
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


class Page(HTMLParser):
    """What a test looks at of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.values: list[tuple[str, float]] = []
        self._rows: list[list[str]] | None = None
        self._cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "table":
            name = " ".join(filter(None, (given.get("class"), given.get("data-artifact"))))
            self._rows = self.tables.setdefault(name or given.get("id") or "", [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th") and self._rows:
            self._cell = []
        if given.get("data-value"):
            self.values.append((self._rows[-1][0], float(given["data-value"])))

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self._rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data)


@pytest.fixture(scope="module")
def made(reported, tmp_path_factory):
    """The page's file and its text."""
    from pathlib import Path

    from edgeforge.reports.page import write_page

    out = tmp_path_factory.mktemp("page") / "report.html"
    path, notes = write_page([reported.all, reported.root / "bare"], out)
    assert notes == [f"{reported.root / 'bare'}: it has no report, so the page has no figure of it"]
    return Path(path), path.read_text(encoding="utf-8")


def test_figures_are_those_of_the_reports(made, reported):
    page = Page(made[1])
    rows = {row[0][0]: row[1:] for row in page.tables["figures"][1:]}
    for letter, folder in (("A", reported.int4), ("B", reported.int8)):
        report = json.loads((folder / "report.json").read_text())
        known = report["intervals"]
        ends = known["total"]["kl_mean"]
        assert rows[letter][1] == (
            f"{number(report['total']['kl_mean'])} [{number(ends['low'])}, {number(ends['high'])}]"
        )
        assert rows[letter][2].startswith(number(report["quantization"]["kl_mean"]) + " ")
        assert rows[letter][3].startswith(number(report["lowering"]["kl_mean"]) + " ")
        assert rows[letter][4].startswith(share(report["total"]["top1_agreement"]) + " ")
        assert rows[letter][5].startswith(ratio(report["perplexity_ratio"]) + " ")
        checks = {row[0]: row for row in page.tables[f"checks {letter}"][1:]}
        assert checks.keys() == {each["name"] for each in report["checks"]} and checks
        for each in report["checks"]:
            assert checks[each["name"]][1] == each["verdict"]
            if each["value"] is not None:
                assert (each["name"], each["value"]) in page.values
    assert rows["C"][1] == "it has no report"
    verdicts = {row[0]: row[1] for row in page.tables["verdicts"][1:]}
    assert verdicts["C"] == "not verified"


def test_errors_by_layer_are_the_manifests(made, reported):
    manifest = json.loads((reported.int4 / "edgeforge.json").read_text())
    heat = Page(made[1]).tables["heat"]
    kinds = heat[0]
    row = next(row for row in heat if row[0] == "0")
    error = manifest["weights"]["model.layers.0.mlp.down_proj.weight"]["relative_error"]
    assert row[kinds.index("down_proj")] == f"{100 * error:.2f}"


def test_the_page_is_small_and_loads_nothing(made):
    path, text = made
    assert path.stat().st_size < LARGEST_PAGE
    page = Page(text)
    for tag, given in page.tags:
        assert tag not in ("script", "img", "iframe", "object", "image")
        for name in ("src", "href", "xlink:href"):
            place = given.get(name) or "#"
            assert place.startswith(("#", "data:")), (tag, place)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(page.ids) == len(set(page.ids))
    known = set(page.ids)
    for mark in re.findall(r'(?:href="|url\()#([^")]+)', text):
        assert mark in known


def test_tables_have_captions_and_scopes_and_charts_have_names(made):
    page = Page(made[1])
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption")
    assert all("scope" in given for tag, given in page.tags if tag == "th")
    assert all(given.get("aria-label") for tag, given in page.tags if tag == "svg")
    assert any(given.get("class") == "skip" for _, given in page.tags)
    assert "#010203" not in made[1] and "var(--ink)" in made[1]


def test_a_failed_check_comes_first_and_nothing_of_a_name_acts(copies, tmp_path, edgeforge):
    evil = copies / "<img src=x onerror=alert(1)>"
    (copies / "int4").rename(evil)
    path = evil / "report.json"
    data = unseal(path.read_text())
    data["checks"][0] |= {"verdict": "failed", "message": "</td><script>alert(2)</script>"}
    path.write_text(seal(data))
    done = edgeforge("report", evil, "--out", tmp_path / "p.html")
    assert done.code == 0, done.err
    text = (tmp_path / "p.html").read_text()
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.tables["verdicts"][1][1] == "failed"
    assert page.tables["checks A"][1][1] == "failed"


def test_a_page_replaces_no_file_of_an_artifact(reported, edgeforge):
    for name in ("report.json", "edgeforge.json", "model.onnx"):
        before = (reported.int4 / name).read_bytes()
        done = edgeforge("report", reported.int4, "--out", reported.int4 / name)
        assert done.code == 2 and "choose a place apart" in done.err
        assert (reported.int4 / name).read_bytes() == before
    done = edgeforge("report", reported.int4, "--out", reported.root)
    assert done.code == 2 and "name a file in an existing folder" in done.err


def test_the_front_has_what_no_other_beats():
    points = [Point("a", 2, 1.0), Point("b", 2, 2.0), Point("c", 1, 3.0), Point("d", 3, 1.0)]
    assert [point.name for point in front(points)] == ["c", "a"]


def test_peers_are_known_for_the_demo_and_for_no_stranger():
    from edgeforge.model.model import DEMO, open_model

    assert len(peers_of(open_model(DEMO).checkpoint.digest().sha256)) >= 4
    assert peers_of("0" * 64) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_has_nothing_to_complain_of(made, tmp_path, width):
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--window-size={width},900", "--dump-dom", made[0].as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "How it was measured" in done.stdout
    assert "CONSOLE" not in done.stderr
    # The page itself asks for nothing but its own file.
    asked = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
    assert not {url for url in asked if "google" not in url and "gvt1" not in url}


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"place": "layer 3, attention"}, "the router of layer 3, attention agrees least,"),
        ({}, "the least router agrees"),
    ],
)
def test_the_router_that_agrees_least_is_told_where_a_report_says_its_place(place, words):
    routing = {"tokens": 100, "changed": 2, "agreement": 0.9, "unread": "", "own": {"kl_mean": 0.5}}
    shown = SimpleNamespace(data={"routing": routing | place})
    entry = Entry("A", shown, "SOUND", "passed", Heat((), ()), (), "")
    assert f"{words} in 90.0 % of experts" in entry.routing
